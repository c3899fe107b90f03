"""`torchrank serve --variant` and `--provider`: what is taken, and what is said about it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.export.test_variants import failed, slow_down
from tests.serving.bundle_factory import TinyModel, build_bundle, publish_bundle
from tests.serving.running import command_line, running_service


@pytest.fixture
def published(tmp_path: Path) -> tuple[TinyModel, str]:
    """A bundle of its own, to be damaged, and the store it is in."""
    model, store = build_bundle(tmp_path / "bundle"), f"memmap://{tmp_path / 'store'}"
    publish_bundle(model, store)
    return model, store


def refused(*arguments: str | Path) -> str:
    result = subprocess.run(command_line("serve", *arguments), check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize(("slow", "fast"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_auto_takes_the_fastest(published: tuple[TinyModel, str], tmp_path: Path, slow: str, fast: str) -> None:
    model, store = published
    slow_down(model.folder / model.manifest.variant(slow).file)
    with running_service(tmp_path / "log", model.folder, "--store", store) as service:
        assert httpx.get(f"{service.url}/ready").json()["variant"] == fast
        assert service.terminate() == 0
    times = rf"{fast} [\d.]+ ms, {slow} [\d.]+ ms; medians, 1 user with 500 candidates"
    said = rf" INFO torchrank\.serving: variant {fast} is taken, the fastest on this host: {times}\n"
    assert re.search(said, service.log.read_text())


def test_auto_takes_none_that_did_not_pass(published: tuple[TinyModel, str], tmp_path: Path) -> None:
    model, store = published
    slow_down(model.folder / "model.onnx")
    failed(model.folder, "fp16")
    with running_service(tmp_path / "log", model.folder, "--store", store) as service:
        assert httpx.get(f"{service.url}/ready").json()["variant"] == "fp32"
    assert "; fp16 is left out: it did not pass its gate" in service.log.read_text()


def test_a_named_one_is_taken_with_a_warning(published: tuple[TinyModel, str], tmp_path: Path) -> None:
    model, store = published
    failed(model.folder, "fp16")
    with running_service(tmp_path / "log", model.folder, "--store", store, "--variant", "fp16") as service:
        assert httpx.get(f"{service.url}/ready").json()["variant"] == "fp16"
    assert service.log.read_text().count("\n") == 1
    assert "WARNING torchrank.serving: variant fp16 did not pass its gate" in service.log.read_text()


def test_an_unknown_one_is_refused(published: tuple[TinyModel, str]) -> None:
    model, store = published
    stderr = refused(model.folder, "--store", store, "--variant", "int8")
    assert stderr == "Error: bundle tiny@1 has no variant 'int8'; it has: fp32, fp16\n"


@pytest.mark.parametrize("variant", ["auto", "fp16"])
def test_a_provider_that_is_not_there(published: tuple[TinyModel, str], variant: str) -> None:
    model, store = published
    stderr = refused(model.folder, "--store", store, "--provider", "cuda", "--variant", variant)
    assert stderr.startswith("Error: provider 'cuda': the installed onnxruntime ")
    assert "has no CUDAExecutionProvider; available: cpu; cuda comes with onnxruntime-gpu" in stderr
    assert stderr.count("\n") == 1
