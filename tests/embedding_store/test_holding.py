"""A process that reads a release keeps it pinned."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from embedding_store.gc import collect
from embedding_store.holding import Hold
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.releases import activate
from tests.embedding_store.bundles import TestTable, make_bundle
from tests.redis_server import RedisServer

TABLES = (TestTable("item", "fp16", rows=100, dim=8),)


def test_a_release_that_is_read_is_pinned_again_and_again(redis_server: RedisServer, tmp_path: Path) -> None:
    with open_backend(redis_server.url) as backend, open_backend(redis_server.url) as other:
        for version in "12":
            publish(make_bundle(tmp_path / version, 1, version=version, tables=TABLES).folder, other)
            activate(other, f"demo@{version}")
        with Hold(backend, ["demo@1"], seconds=1.5):
            time.sleep(2.5)  # longer than a pin holds
            assert other.pins().keys() == {"demo@1"}
            assert not any(decision.removed for decision in collect(other, keep=0, grace=0))
        assert other.pins() == {}
        assert [decision.release for decision in collect(other, keep=0, grace=0) if decision.removed] == ["demo@1"]


def test_where_it_cannot_pin_it_says_so_once(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_backend(f"{redis_server.url}?timeout=0.1") as backend:
        publish(make_bundle(tmp_path / "1", 1, tables=TABLES).folder, backend)
        redis_server.stop()
        with caplog.at_level(logging.WARNING), Hold(backend, ["demo@1"], seconds=0.15):
            time.sleep(0.6)
    [warning] = [record.getMessage() for record in caplog.records if record.name == "embedding_store.holding"]
    assert warning.startswith("demo@1: not pinned, torchrank gc may remove it: redis+unix://")
