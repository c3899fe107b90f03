"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer

if TYPE_CHECKING:
    from omegaconf import DictConfig


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A fresh, empty redis-server. Where none is installed the test fails: what needs Redis is not tested otherwise."""
    server = RedisServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    """Six nodes, shared: a test has a prefix of its own and leaves the nodes and slots as they are."""
    cluster = RedisCluster()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/tiny.py's data set."""
    from tests.tiny import write_data

    return write_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def composed(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """composed("training.epochs=2", run="a"): configuration of a run in tmp_path/a, which is the working directory."""
    from tests.tiny import compose_tiny

    monkeypatch.chdir(tmp_path)  # a training leaves outputs/latest_run there

    def make(*overrides: str, run: str = "run", model: str = "mmoe") -> DictConfig:
        return compose_tiny(tiny_data, tmp_path / run, f"+model={model}", *overrides)

    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on one rank, shared by the tests of what is done with one: read-only."""
    from tests.tiny import compose_tiny
    from torchrank.train import train

    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        train(compose_tiny(tiny_data, folder, "+model=mmoe", "model.attention={history: item_id}", "sharding=row_wise"))
    return folder
