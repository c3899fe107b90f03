"""EmbeddingStore over real backends: values, statuses, releases kept apart, warming, bounds."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store import caches
from embedding_store.codec import decode
from embedding_store.errors import UnknownRelease, UnknownTable
from embedding_store.lookup import ABSENT, FOUND
from embedding_store.open import open_store
from embedding_store.publish import publish
from embedding_store.releases import activate, rollback
from embedding_store.served import ServedStore
from embedding_store.store import EmbeddingStore
from tests.embedding_store.bundles import Bundle, make_bundle


@pytest.fixture(params=["memmap", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memmap":
        return f"memmap://{tmp_path / 'store'}"
    server_url: str = request.getfixturevalue("redis_server").url
    return server_url


@pytest.fixture(params=[0, 40_000, 10_000_000], ids=["no cache", "small cache", "large cache"])
def store(url: str, request: pytest.FixtureRequest) -> Iterator[EmbeddingStore]:
    with open_store(url, cache_bytes=request.param) as store:
        yield store


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=1)


def random_ids(bundle: Bundle, rng: np.random.Generator, most: int = 200) -> dict[str, NDArray[np.int64]]:
    """Mostly frequent, often twice, some unknown, some tables left out, some asked for nothing."""
    ids = {}
    for table in bundle.manifest.tables:
        if rng.random() < 0.8:
            some = (rng.zipf(1.3, rng.integers(0, most)) * 17) % (table.rows + 20)
            ids[table.name] = np.where(rng.random(len(some)) < 0.05, -some, some).astype(np.int64)
    return ids


def check(store: EmbeddingStore, bundle: Bundle, ids: dict[str, NDArray[np.int64]]) -> None:
    reply = store.lookup(bundle.name, ids, timeout=10)
    assert reply.release == bundle.name
    assert list(reply.tables) == list(ids)
    for name, answer in reply.tables.items():
        expected, found = bundle.expected(name, ids[name])
        codec = bundle.manifest.table(name).codec
        np.testing.assert_array_equal(decode(codec, answer.rows)[answer.index].reshape(expected.shape), expected)
        np.testing.assert_array_equal(answer.status[answer.index], np.where(found, FOUND, ABSENT))


@pytest.mark.parametrize("seed", range(3))
def test_random_requests(store: EmbeddingStore, bundle: Bundle, seed: int) -> None:
    publish(bundle.folder, store.backend)
    rng = np.random.default_rng(seed)
    for step in range(25):
        if step == 5:
            store.warm(bundle.name)
        check(store, bundle, random_ids(bundle, rng))
    stats = store.stats()
    assert stats.lookups == 25
    assert stats.cache_bytes <= stats.cache_budget
    assert (stats.hit_rate > 0) == (stats.cache_budget > 0)


def test_releases_are_never_mixed(store: EmbeddingStore, tmp_path: Path) -> None:
    """Two versions of one model and another model, asked in turn by several threads."""
    bundles = [make_bundle(tmp_path / str(i), i, model=model, version=version) for i, (model, version) in
               enumerate([("demo", "1"), ("demo", "2"), ("other", "1")])]  # fmt: skip
    for one in bundles:
        publish(one.folder, store.backend)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            one = bundles[rng.integers(3)]
            if rng.random() < 0.1:
                store.warm(one.name)
            check(store, one, random_ids(one, rng, most=60))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    assert store.stats().cache_bytes <= store.stats().cache_budget


def test_a_warmed_table_answers_its_hot_ids_without_the_backend(url: str, bundle: Bundle) -> None:
    with open_store(url, cache_bytes=10_000_000) as store:
        publish(bundle.folder, store.backend)
        loaded = store.warm(bundle.name)
        assert loaded == {name: len(ids) for name, ids in bundle.hot.items()}
        check(store, bundle, bundle.hot)
        stats = store.stats()
        assert (stats.total("hits"), stats.total("misses")) == (sum(loaded.values()), 0)


def test_absent_ids_are_counted_and_remembered(url: str, bundle: Bundle) -> None:
    with open_store(url, cache_bytes=10_000_000) as store:
        publish(bundle.folder, store.backend)
        ids = {"user": np.array([-1, 1300, 5, -1, 5], np.int64)}
        check(store, bundle, ids)
        user = store.stats().releases[bundle.name]["user"]
        assert (user.hits, user.misses, user.absent) == (0, 3, 2)
        check(store, bundle, ids)
        user = store.stats().releases[bundle.name]["user"]
        assert (user.hits, user.misses, user.absent) == (3, 3, 4)


def test_the_active_release_is_followed(url: str, tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / version, int(version), version=version) for version in ("1", "2")]
    with open_store(url, cache_bytes=100_000) as store:
        publish(bundles[0].folder, store.backend)
        with pytest.raises(UnknownRelease, match="no release is active in"):
            store.manifest()
        with pytest.raises(UnknownRelease, match="no release of model 'demo' is active"):
            store.manifest(model="demo")
        activate(store.backend, "demo@1")
        assert store.manifest().name == store.manifest(model="demo").name == "demo@1"
        publish(bundles[1].folder, store.backend)
        activate(store.backend, "demo@2")
        assert store.manifest(model="demo") == bundles[1].manifest
        rollback(store.backend, "demo")
        assert store.manifest(model="demo") == bundles[0].manifest
        other = make_bundle(tmp_path / "other", 3, model="other")
        publish(other.folder, store.backend)
        activate(store.backend, other.name)
        with pytest.raises(UnknownRelease, match="has several active releases, name one: demo@1, other@1"):
            store.manifest()


def test_the_cache_goes_to_the_latest_release(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = [make_bundle(tmp_path / version, int(version), version=version) for version in ("1", "2")]
    with open_store(url, cache_bytes=10_000_000) as store:
        for one in bundles:
            publish(one.folder, store.backend)
            store.warm(one.name)
        for _ in range(2):
            check(store, bundles[0], bundles[0].hot)  # replaced: answered without a cache
        assert all(table.bytes == 0 for table in store.stats().releases["demo@1"].values())
        assert store.stats().releases["demo@2"]["item"].bytes > 0
        monkeypatch.setattr(caches, "TAKEOVER_SECONDS", -1.0)  # its successor was not asked for so long
        for _ in range(2):
            check(store, bundles[0], bundles[0].hot)
        demo1 = store.stats().releases["demo@1"]["item"]
        assert (demo1.hits, demo1.misses, demo1.entries) == (500, 3 * 500, 500)  # counting went on


def test_what_a_look_up_refuses(url: str, bundle: Bundle) -> None:
    with open_store(url) as store:
        publish(bundle.folder, store.backend)
        with pytest.raises(UnknownTable, match="has no table 'author'; it has: item"):
            store.lookup(bundle.name, {"author": np.zeros(1, np.int64)})
        with pytest.raises(UnknownRelease, match="no release 'demo@9'"):
            store.lookup("demo@9", {})
        with pytest.raises(ValueError, match=r"table 'item': ids must be int64 \[n\], not float64 \[2\]"):
            store.lookup(bundle.name, {"item": np.zeros(2)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="cache_bytes is -1"):
        open_store(url, cache_bytes=-1)


def test_models_share_the_budget_and_leave_each_other_alone(url: str, tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / model, seed, model=model) for seed, model in enumerate(("a", "b", "c"))]
    with open_store(url, cache_bytes=60_000) as store:
        for count, one in enumerate(bundles, 1):
            publish(one.folder, store.backend)
            for other in (*bundles[:count], *bundles[:count]):  # once to come to an equal share, once to fill it
                check(store, other, {"item": other.hot["item"][:20]})
            before = store.stats()
            for other in bundles[:count]:
                check(store, other, {"item": other.hot["item"][:20]})
            after = store.stats()
            assert after.cache_bytes <= 60_000
            assert after.total("misses") == before.total("misses")
            assert after.total("hits") == before.total("hits") + 20 * count


def test_a_sidecars_store_keeps_all_active_models_warm(url: str, tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / model, seed, model=model) for seed, model in enumerate(("a", "b"))]
    store = open_store(url, cache_bytes=200_000)
    with ServedStore(store) as served:
        for one in bundles:
            publish(one.folder, store.backend)
            activate(store.backend, one.name)
        for one in bundles:
            served.warm(one.name)
        for one in bundles:
            check(store, one, {"item": one.hot["item"][:20]})
        assert (store.stats().total("hits"), store.stats().total("misses")) == (40, 0)
        assert store.stats().cache_bytes <= 200_000


def test_an_older_release_does_not_take_the_cache_of_one_in_use(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart in the middle of a roll-out, when hosts that still serve the older one ask on."""
    old, new = (make_bundle(tmp_path / day, int(day), version=day, created=f"2026-01-0{day}T00:00:00Z") for day in "12")
    with open_store(url, cache_bytes=10_000_000) as store:
        publish(old.folder, store.backend)
        publish(new.folder, store.backend)
        store.warm(new.name)
        for _ in range(3):
            check(store, old, {"item": old.hot["item"]})
            assert set(store.warm(old.name, take_over=False).values()) == {0}
            check(store, new, {"item": new.hot["item"]})
        assert store.stats().releases[new.name]["item"].misses == 0
        monkeypatch.setattr(caches, "TAKEOVER_SECONDS", -1.0)  # the newer one was not asked for so long: rolled back
        for _ in range(2):
            check(store, old, {"item": old.hot["item"]})
        assert store.stats().releases[old.name]["item"].hits == len(old.hot["item"])
