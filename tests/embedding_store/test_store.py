"""EmbeddingStore over real backends: values, statuses, releases kept apart, warming, bounds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.batch import IdBatch
from embedding_store.codec import decode
from embedding_store.errors import InvalidRelease, UnknownRelease, UnknownTable
from embedding_store.lookup import ABSENT, FOUND
from embedding_store.open import open_store
from embedding_store.publish import publish
from embedding_store.releases import activate, rollback
from embedding_store.store import EmbeddingStore
from tests.embedding_store.bundles import Bundle, make_bundle
from tests.embedding_store.damage import damager
from tests.redis_server import RedisServer


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
    asked = sum(table.raw_ids for table in stats.releases[bundle.name].values())
    answered = sum(stats.total(status) for status in ("found", "absent", "unavailable", "stale"))
    assert asked >= answered == stats.total("hits") + stats.total("misses")
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


def test_a_lost_hot_list_is_told_and_the_release_served(
    url: str, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(url, cache_bytes=10_000_000) as store, caplog.at_level(logging.WARNING):
        publish(bundle.folder, store.backend)
        store.warm(bundle.name)
        assert not caplog.records
        damager(store.backend, bundle.name).lose_hot("item")
        store.forget(bundle.name)
        loaded = store.warm(bundle.name)
        assert loaded == {name: len(ids) for name, ids in bundle.hot.items()} | {"item": 0}
        check(store, bundle, bundle.hot)
        [record] = caplog.records
        count = len(bundle.hot["item"])
        assert record.getMessage() == (
            f"{store.backend.address} has lost the hot list of demo@1's table 'item', of {count} ids (evicted or "
            "deleted?): its cache starts cold; `torchrank verify BUNDLE --store URL --mend` writes it again"
        )


def test_a_hot_list_of_another_length_is_damage(tmp_path: Path, bundle: Bundle) -> None:
    with open_store(f"memmap://{tmp_path / 'store'}", cache_bytes=10_000_000) as store:
        publish(bundle.folder, store.backend)
        path = tmp_path / "store" / "releases" / bundle.name / "tables" / "item.hot"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(
            InvalidRelease, match=rf"the hot list of demo@1's table 'item' has {path.stat().st_size} bytes"
        ):
            store.warm(bundle.name)


def test_absent_ids_are_counted_and_remembered(url: str, bundle: Bundle) -> None:
    with open_store(url, cache_bytes=10_000_000) as store:
        publish(bundle.folder, store.backend)
        ids = {"user": np.array([-1, 1300, 5, -1, 5], np.int64)}
        check(store, bundle, ids)
        user = store.stats().releases[bundle.name]["user"]
        assert (user.hits, user.misses, user.found, user.absent) == (0, 3, 1, 2)
        assert (user.raw_ids, user.raw_misses, user.raw_hit_rate) == (5, 5, 0.0)
        check(store, bundle, ids)
        user = store.stats().releases[bundle.name]["user"]
        assert (user.hits, user.misses, user.found, user.absent) == (3, 3, 2, 4)
        assert (user.raw_ids, user.raw_misses, user.raw_hit_rate, user.hit_rate) == (10, 5, 0.5, 0.5)


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


def test_both_versions_of_a_model_are_cached_side_by_side(url: str, tmp_path: Path) -> None:
    """As during a roll-out, and after a rollback, which finds its rows still warm."""
    bundles = [make_bundle(tmp_path / version, int(version), version=version) for version in ("1", "2")]
    with open_store(url, cache_bytes=10_000_000) as store:
        for one in bundles:
            publish(one.folder, store.backend)
            store.warm(one.name)
        for _ in range(2):
            for one in bundles:
                check(store, one, one.hot)
        assert store.stats().total("misses") == 0


def test_a_release_that_is_forgotten_takes_no_room(url: str, tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / version, int(version), version=version) for version in ("1", "2")]
    with open_store(url, cache_bytes=10_000_000) as store:
        for one in bundles:
            publish(one.folder, store.backend)
            store.warm(one.name)
        store.forget(bundles[0].name)
        assert list(store.stats().releases) == [bundles[1].name]
        check(store, bundles[1], bundles[1].hot)
        assert store.stats().total("misses") == 0
        check(store, bundles[0], bundles[0].hot)  # who asks all the same is answered
        assert store.stats().releases[bundles[0].name]["item"].misses == len(bundles[0].hot["item"])


def test_totals_do_not_fall_when_a_release_is_forgotten(url: str, tmp_path: Path) -> None:
    """Whoever watches a counter that fell would add what is left of it once more."""
    bundles = [make_bundle(tmp_path / version, int(version), version=version) for version in ("1", "2")]
    counters = ("hits", "misses", "raw_ids", "found", "absent", "fetches", "fetched", "joined", "shed")
    with open_store(url, cache_bytes=10_000_000) as store:
        for one in bundles:
            publish(one.folder, store.backend)
            for _ in range(2):
                check(store, one, one.hot | {"user": np.array([-1, 5])})
        before = {counter: store.stats().total(counter) for counter in counters}
        assert min(before[counter] for counter in ("hits", "misses", "raw_ids", "found", "absent")) > 0
        entries = store.stats().total("entries")
        store.forget(bundles[0].name)
        assert {counter: store.stats().total(counter) for counter in counters} == before
        assert store.stats().total("entries") < entries  # which is no counter
        asked = before["found"] + before["absent"]
        check(store, bundles[1], {"user": np.array([-1, 5])})
        assert store.stats().total("found") + store.stats().total("absent") == asked + 2


def test_a_look_up_under_way_does_not_bring_back_what_is_forgotten(url: str, bundle: Bundle) -> None:
    with open_store(url, cache_bytes=10_000_000) as store:
        publish(bundle.folder, store.backend)
        place = bundle.manifest.places["user"]
        batch = IdBatch(np.array([place]), np.array([2]), np.array([7, -1]))
        out = np.empty(2 * bundle.manifest.tables[place].row_bytes, np.uint8)
        status = np.empty(2, np.uint8)
        misses = store.begin(bundle.name, batch, out, np.zeros(1, np.int64), status)
        assert misses is not None
        store.forget(bundle.name)
        store.finish(misses)
        assert status.tolist() == [FOUND, ABSENT]
        expected, _ = bundle.expected("user", batch.ids)
        np.testing.assert_array_equal(decode(bundle.manifest.tables[place].codec, out.reshape(2, -1)), expected)
        assert store.stats().releases == {}


def test_who_asks_while_a_release_is_forgotten_gets_it_cached(
    url: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(url, cache_bytes=10_000_000) as store, ThreadPoolExecutor(1) as pool:
        publish(bundle.folder, store.backend)
        ids = {"user": np.arange(50)}
        check(store, bundle, ids)
        forget, asked = store._cache.forget, []

        def forget_while_asked(release: str) -> None:
            asked.append(pool.submit(check, store, bundle, ids))
            wait(asked, timeout=0.3)  # it may end before, or have to wait until all is forgotten
            forget(release)

        monkeypatch.setattr(store._cache, "forget", forget_while_asked)
        store.forget(bundle.name)
        asked[0].result(20)
        for _ in range(2):
            check(store, bundle, ids)
        assert store.stats().releases[bundle.name]["user"].hits >= 50


def test_what_a_look_up_refuses(url: str, bundle: Bundle) -> None:
    with open_store(url) as store:
        publish(bundle.folder, store.backend)
        with pytest.raises(UnknownTable, match="has no table 'author'; it has: item"):
            store.lookup(bundle.name, {"author": np.zeros(1, np.int64)})
        with pytest.raises(UnknownRelease, match="no release 'demo@9'"):
            store.lookup("demo@9", {})
        with pytest.raises(ValueError, match=r"table 'item': ids must be int64 \[n\], not float64 \[2\]"):
            store.lookup(bundle.name, {"item": np.zeros(2)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="the cache's budget is -1 bytes"):
        open_store(url, cache_bytes=-1)


def test_models_share_the_budget(url: str, tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / model, seed, model=model) for seed, model in enumerate(("a", "b", "c"))]
    with open_store(url, cache_bytes=200_000) as store:
        for one in bundles:
            publish(one.folder, store.backend)
        store.expect(one.name for one in bundles)
        for _ in range(3):
            for one in bundles:
                check(store, one, {"item": one.hot["item"][:20]})
        stats = store.stats()
        assert stats.cache_bytes <= 200_000
        assert stats.total("misses") == 3 * 20
        assert stats.total("hits") == 2 * 3 * 20


def test_misses_of_one_look_up_and_another_are_one_fetch(redis_server: RedisServer, bundle: Bundle) -> None:
    """A stampede through the whole store: 64 threads, one GETRANGE per id as the server counts them."""
    ids = {"user": np.arange(200, dtype=np.int64)}
    with open_store(redis_server.url, cache_bytes=1_000_000) as store, redis_server.client() as client:
        publish(bundle.folder, store.backend)
        store.lookup(bundle.name, {"user": np.array([500])})  # reads the manifest, and opens a connection
        client.config_resetstat()
        client.execute_command("CLIENT PAUSE", 400, "ALL")  # all 64 are there before the first answer
        with ThreadPoolExecutor(64) as threads:
            list(threads.map(lambda _: check(store, bundle, ids), range(64)))
        calls = client.info("commandstats")["cmdstat_getrange"]["calls"]
    assert calls == 200
    assert store.stats().misses[bundle.name].joined == 63 * 200
