"""Releases that a sidecar serves are pinned in its store; those that nobody asks for are let go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from embedding_store import sidecar_releases
from embedding_store.backend import Backend
from embedding_store.degrade import parse_policy
from embedding_store.errors import UnknownRelease
from embedding_store.gc import collect
from embedding_store.open import open_backend, open_store
from embedding_store.publish import publish
from embedding_store.releases import activate
from embedding_store.served import ServedStore
from embedding_store.sidecar_releases import ServedReleases
from embedding_store.store import EmbeddingStore
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.sidecar.conftest import Starter

TABLES = (TestTable("item", "fp16", rows=500, dim=16, hot=50),)


@pytest.fixture(params=["memmap", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memmap":
        return f"memmap://{tmp_path / 'store'}"
    address: str = request.getfixturevalue("redis_server").url
    return address


@pytest.fixture
def store(url: str) -> Iterator[EmbeddingStore]:
    with open_store(url, cache_bytes=1_000_000) as store:
        yield store


@pytest.fixture
def releases(store: EmbeddingStore) -> Iterator[ServedReleases]:
    with ThreadPoolExecutor(1) as threads:
        yield ServedReleases(ServedStore(store), threads)


def run(work: Callable[[], Awaitable[object]]) -> None:
    async def body() -> None:
        await work()

    asyncio.run(body())


def release(backend: Backend, folder: Path, version: str) -> Bundle:
    bundle = make_bundle(folder / version, int(version), version=version, tables=TABLES)
    publish(bundle.folder, backend)
    activate(backend, bundle.name)
    return bundle


def test_what_is_served_is_pinned_and_what_is_not_is_forgotten(
    releases: ServedReleases, store: EmbeddingStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar_releases, "IN_USE_SECONDS", 0.0)
    with open_backend(url) as other:
        for version in "123":
            release(other, tmp_path, version)
            for _ in range(2):  # the one before is held until the new one is warm
                run(releases.move)
            assert list(other.pins()) == [f"demo@{version}"]
        assert set(releases.manifests) == {"demo@2", "demo@3"}  # a rollback finds its release warm
        assert set(store.stats().releases) == {"demo@2", "demo@3"}
        kept = {decision.release: decision for decision in collect(other, keep=0, grace=0) if not decision.removed}
        assert kept.keys() == {"demo@3"}
        run(releases.release_all)
        assert other.pins() == {}


def test_a_release_that_is_asked_for_is_in_use(
    releases: ServedReleases, store: EmbeddingStore, url: str, tmp_path: Path
) -> None:
    """A service that still ranks by an older bundle names its release in every look-up."""
    with open_backend(url) as other:
        for version in "123":
            release(other, tmp_path, version)
            run(releases.move)
            releases.used["demo@1"] = 1e12  # just now, for a long time
        run(releases.move)
        assert other.pins().keys() == {"demo@1", "demo@3"}
        removed = {decision.release for decision in collect(other, keep=0, grace=0) if decision.removed}
        assert removed == {"demo@2"}
        assert store.lookup("demo@1", {"item": np.arange(20)}).tables["item"].status.sum() == 0


def test_a_sidecar_pins_what_it_serves(start: Starter, url: str, tmp_path: Path) -> None:
    with open_backend(url) as backend:
        bundle = release(backend, tmp_path, "1")
        sidecar = start("--poll-seconds", "0.1", url=url)
        [owner] = backend.pins()[bundle.name]
        assert str(sidecar.process.pid) in owner
        client = sidecar.client()
        assert client.lookup(bundle.name, {"item": np.arange(9)}).tables["item"].status.sum() == 0
        sidecar.stop()
        assert backend.pins() == {}


def test_without_the_right_to_pin_it_says_so_once(
    releases: ServedReleases, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    release(store.backend, tmp_path, "1")

    def refused(owner: str, pinned: object, seconds: float) -> frozenset[str]:
        raise UnknownRelease("no right to write")

    monkeypatch.setattr(store.backend, "pin", refused)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            run(releases.move)
    assert releases.active == {"demo": "demo@1"}
    assert [record.getMessage() for record in caplog.records] == [
        "releases in use are not pinned, torchrank gc may remove them: no right to write"
    ]


def test_a_table_of_the_policy_that_no_release_has_is_told(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and as long as it is so in INFO; a release to come may have it."""
    degrade = parse_policy(["itm=default", "item=default", "user=default", "previous,error"])
    with open_store(url, degrade=degrade) as store, ThreadPoolExecutor(1) as threads:
        releases = ServedReleases(ServedStore(store), threads)
        store.backend.create()
        with caplog.at_level(logging.WARNING):
            run(releases.move)
            assert releases.unknown_tables() == set()  # there is nothing to compare it with
            release(store.backend, tmp_path, "1")
            run(releases.move)
            run(releases.move)
            assert releases.unknown_tables() == {"itm", "user"}
            other = TestTable("user", "fp32", rows=10, dim=4)
            publish(make_bundle(tmp_path / "2", 2, version="2", tables=(*TABLES, other)).folder, store.backend)
            activate(store.backend, "demo@2")
            run(releases.move)
        assert releases.unknown_tables() == {"itm"}
        assert [record.getMessage() for record in caplog.records] == [
            "--on-unavailable names 'itm', 'user', which no release in use has (demo@1); their tables are: item"
        ]


def test_who_looks_for_no_new_releases_pins_all_the_same(
    store: EmbeddingStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar_releases, "PIN_SECONDS", 0.6)

    async def body() -> None:
        await releases.move()
        following = asyncio.ensure_future(releases.follow())
        await asyncio.sleep(1.5)
        assert list(other.pins()) == ["demo@1"]
        following.cancel()

    with open_backend(url) as other, ThreadPoolExecutor(1) as threads:
        release(other, tmp_path, "1")
        releases = ServedReleases(ServedStore(store), threads, poll_seconds=0)
        asyncio.run(body())


@dataclass
class Meanwhile:
    """A manifest; while it is looked at another one is read."""

    others: dict[str, Any]

    @property
    def places(self) -> dict[str, int]:
        self.others[f"demo@{len(self.others)}"] = self
        return {"item": 0}


def test_manifests_that_threads_read_meanwhile(url: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = parse_policy(["itme=default", "item=default"])
    with open_store(url, cache_bytes=1_000_000, degrade=policy) as store, ThreadPoolExecutor(1) as threads:
        releases = ServedReleases(ServedStore(store), threads)
        assert releases.unknown_tables() == set()
        releases.manifests["demo@0"] = cast(Any, Meanwhile(releases.manifests))
        assert releases.unknown_tables() == {"itme"}
        releases._report_unknown_tables()
        assert "names 'itme', which no release in use has (demo@0, demo@1" in caplog.text
