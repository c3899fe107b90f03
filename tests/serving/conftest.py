from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.bundle_factory import TinyModel, build_bundle, publish_bundle
from tests.serving.running import Service, running_service


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def store_url(folder: Path) -> str:
    return f"memmap://{folder / 'store'}"


@pytest.fixture(scope="module")
def model(folder: Path, store_url: str) -> TinyModel:
    """Published to `store_url`."""
    model = build_bundle(folder / "bundle")
    publish_bundle(model, store_url)
    return model


@pytest.fixture(scope="module")
def service(folder: Path, model: TinyModel, store_url: str) -> Iterator[Service]:
    options = ("--max-candidates", "600", "--max-body", "1MiB", "--timeout-ms", "10000", "--concurrency", "4")
    bundle = (model.folder, "--variant", "fp32")  # whose scores are held against float64
    with running_service(folder / "service.log", *bundle, "--store", store_url, *options) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client
