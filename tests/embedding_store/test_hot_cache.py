"""The hot-id cache: right rows of the right release, the byte bound, absent ids, warming, forgetting, counting."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_store.batch import batch_of
from embedding_store.cache_columns import PLACE
from embedding_store.cache_set import WAYS, set_bytes
from embedding_store.hot_cache import HotCache
from embedding_store.lookup import STALE, UNAVAILABLE
from embedding_store.release import ReleaseManifest
from tests.embedding_store.cached_rows import Asked, manifest_of, table_of

POLICIES = ("s3fifo", "lru")
# 1 and 20 bytes are no multiples of 8; "few" shares its sets with "item".
MIXED = manifest_of(
    table_of("item", 20_000, 32), table_of("odd", 3000, 20), table_of("few", 90, 32), table_of("byte", 500, 1),
    table_of("sparse", 4000, 64, sparse=True),
)  # fmt: skip


def traffic(rng: np.random.Generator, manifest: ReleaseManifest) -> dict[str, np.ndarray]:
    """Ids of some of the tables, in an order of their own, hot and cold, repeated and absent; now and then none."""
    tables = rng.permutation(len(manifest.tables))[: rng.integers(1, len(manifest.tables) + 1)]
    return {
        manifest.tables[place].name: rng.zipf(1.2, int(rng.integers(0, 400)))
        * 31
        % (manifest.tables[place].rows * 9 // 8)
        for place in tables
    }


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [0, 100, 700, 10_000, 123_456, 10_000_000])
def test_every_hit_is_right_and_the_budget_holds(budget: int, policy: str) -> None:
    rng = np.random.default_rng(budget)
    cache = HotCache(budget, policy)
    asked = Asked(cache, MIXED)
    ids = sum(len(asked.ask(traffic(rng, MIXED))) for _ in range(200))
    stats = cache.stats()
    tables = stats.releases["m@1"].values()
    assert sum(table.hits + table.misses for table in tables) == ids
    assert sum(table.entries for table in tables) <= stats.capacity
    assert stats.bytes <= cache._layout.memory.nbytes <= budget
    assert (stats.capacity > 0) == (budget > 100)


def test_entries_are_as_many_as_are_found() -> None:
    rng = np.random.default_rng(1)
    cache = HotCache(60_000)
    asked = Asked(cache, MIXED)
    for _ in range(300):
        asked.ask(traffic(rng, MIXED))
    for table in MIXED.tables:
        held = asked.held({table.name: np.arange(-10, table.rows * 9 // 8 + 1)}).sum()
        assert cache.stats().releases["m@1"][table.name].entries == held


@pytest.mark.parametrize("policy", POLICIES)
def test_tables_whose_rows_fit_are_held(policy: str) -> None:
    """Dense ids nearly all, though sets are full to nine tenths; sparse ones, which meet at random, nearly so."""
    dense = manifest_of(*(table_of(f"t{i}", 1000 + 317 * i, 24) for i in range(20)))
    sparse = manifest_of(table_of("s", 30_000, 24, sparse=True), model="s")
    for manifest, share in ((dense, 0.995), (sparse, 0.97)):
        cache = HotCache(30_000_000, policy)
        asked = Asked(cache, manifest)
        everything = {table.name: np.arange(table.rows) for table in manifest.tables}
        asked.ask(everything)
        held = asked.held(everything).mean()
        print(f"{manifest.model} {policy}: {held:.4f} held in {cache.stats().bytes / 24 / asked._limits.sum():.2f} x")
        assert held >= share


def test_ids_of_any_value() -> None:
    ids = np.array([-(2**63), -(2**63) + 1, -1, 0, 1999, 2000, 2**62, 2**63 - 1])
    for sparse in (False, True):
        asked = Asked(HotCache(1_000_000), manifest_of(table_of("t", 2000, 24, sparse=sparse)))
        assert not asked.ask(ids).any()
        assert asked.ask(ids).all()


@pytest.mark.parametrize("stride", [8, 610, 2**20, 2**32, 2**57])
def test_no_stride_of_ids_meets_in_few_sets(stride: int) -> None:
    asked = Asked(HotCache(2000 * set_bytes(8)), manifest_of(table_of("t", 2**60, 8, sparse=stride > 2**20)))
    ids = np.arange(min(8000, 2**63 // stride)) * stride
    asked.ask(ids)
    assert asked.held(ids).mean() > 0.9


def test_absent_ids_take_a_quarter_at_most() -> None:
    for policy in POLICIES:
        asked = Asked(HotCache(50 * set_bytes(24) + 64, policy), manifest_of(table_of("t", 100_000, 24)))
        asked.ask(np.arange(400))
        before = asked.held(np.arange(400)).sum()
        for some in np.array_split(np.arange(-20_000, 0), 10):
            asked.ask(some)
        absent = asked.held(np.arange(-20_000, 0)).sum()
        assert 90 < absent <= 50 * WAYS // 4
        assert asked.held(np.arange(400)).sum() >= before - absent


def test_unsure_answers_are_not_kept() -> None:
    manifest = manifest_of(table_of("t", 100, 8))
    cache = HotCache(100_000)
    asked = Asked(cache, manifest)
    batch = batch_of(manifest, {"t": np.arange(4)})
    status = np.array([UNAVAILABLE, STALE, 255, 0], np.uint8)
    cache.insert(asked.tables, batch, np.zeros(32, np.uint8), status)
    misses = cache.probe(asked.tables, batch, np.empty(32, np.uint8), np.zeros(1, np.int64), status.copy())
    assert misses.tolist() == [0, 1, 2]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_not_recorded_changes_nothing(policy: str) -> None:
    rng = np.random.default_rng(3)
    manifest = manifest_of(table_of("t", 5000, 16))
    plain, watched = (Asked(HotCache(30_000, policy), manifest) for _ in range(2))
    for _ in range(100):
        ids = rng.zipf(1.3, 100) * 37 % 5500
        hit = plain.ask(ids)
        watched.held(rng.integers(0, 5500, 300))
        np.testing.assert_array_equal(watched.ask(ids), hit)
    assert plain.cache.stats() == watched.cache.stats()


def test_counting() -> None:
    cache = HotCache(100_000)
    asked = Asked(cache, manifest_of(table_of("a", 100, 8), table_of("b", 100, 8)))
    asked.ask({"a": np.array([1, 2, 3, 1000]), "b": np.array([5])})
    asked.ask({"b": np.array([6, 5, 2000]), "a": np.array([1, 1000, 50])})
    a, b = (cache.stats().releases["m@1"][name] for name in "ab")
    assert (a.hits, a.misses, a.absent, a.entries) == (2, 5, 2, 5)
    assert (b.hits, b.misses, b.absent, b.entries) == (1, 3, 1, 3)


def test_warming_keeps_the_hottest_and_what_is_there() -> None:
    for policy in POLICIES:
        cache = HotCache(50 * set_bytes(24) + 64, policy)
        asked = Asked(cache, manifest_of(table_of("t", 100_000, 24)))
        ids = np.random.default_rng(1).permutation(100_000)
        asked.ask(ids[:50])
        for part in np.array_split(ids[50:1000], 10):
            asked.warm(part)
        assert cache.stats().releases["m@1"]["t"].evictions == 0
        assert asked.held(ids[:100]).all()  # the hottest came first
        assert 300 < asked.held(ids[:1000]).sum() <= 400
        asked.ask(np.arange(-100, 0))  # something comes: of what was warmed, the coldest goes
        assert asked.held(ids[:100]).mean() > 0.95


def test_warming_a_new_release_takes_half_from_the_old_one() -> None:
    old, new = (manifest_of(table_of("t", 100_000, 24), version=version) for version in "12")
    cache = HotCache(50 * set_bytes(24) + 64)
    before, after = Asked(cache, old), Asked(cache, new)
    hot = np.arange(400)
    before.ask(hot)
    for _ in range(4):
        before.ask(hot[:200])
    used = before.held(hot[:200])
    after.warm(hot)
    assert 190 <= after.held(hot).sum() <= 200  # of 400: half of each set
    assert before.held(hot[:200])[used].mean() > 0.85  # what was not used made room first


def test_warming_leaves_another_model_what_it_uses() -> None:
    mine, other = (manifest_of(table_of("t", 100_000, 24), model=model) for model in ("mine", "other"))
    cache = HotCache(50 * set_bytes(24) + 64)
    first, second = Asked(cache, other), Asked(cache, mine)
    first.ask(np.arange(600))
    used = first.ask(np.arange(300), insert=False)
    second.warm(np.arange(1000))
    assert first.held(np.arange(300))[used].all()
    assert first.held(np.arange(300, 600)).sum() < 100
    assert 100 < second.held(np.arange(1000)).sum() <= 200


def test_releases_live_side_by_side_until_forgotten() -> None:
    old, new = (manifest_of(table_of("t", 3000, 24), version=version) for version in "12")
    cache = HotCache(400 * set_bytes(24) + 64)
    before = Asked(cache, old)
    before.ask(np.arange(3000))
    held = before.held(np.arange(3000))
    after = Asked(cache, new)
    np.testing.assert_array_equal(before.held(np.arange(3000)), held)  # registering moved nothing
    for _ in range(10):
        after.ask(np.arange(1500))
    assert after.held(np.arange(1500)).mean() > 0.9
    assert cache.tables(old) is before.tables
    cache.forget(old.name)
    assert set(cache.stats().releases) == {new.name}
    after.ask(np.arange(3000))
    assert after.held(np.arange(3000)).mean() > 0.95  # its entries were as good as empty


def test_a_forgotten_release_is_mistaken_for_nobody() -> None:
    """Its number's place is given to another while its entries are still in the sets."""
    table = table_of("t", 2000, 24)
    cache = HotCache(1_000_000)
    gone = Asked(cache, manifest_of(table))
    gone.ask(np.arange(2000))
    cache.forget("m@1")
    for number in range((1 << 14) // 2 - 1):  # as many tables as there are other places
        other = manifest_of(table_of("a", 1, 24), table_of("b", 1, 24), model="other", version=str(number))
        cache.tables(other)
        cache.forget(other.name)
    assert gone.held(np.arange(2000)).mean() > 0.99
    later = Asked(cache, manifest_of(table, version="2"))
    assert later.tables.columns[0, PLACE] == gone.tables.columns[0, PLACE]
    assert not later.held(np.arange(2000)).any()
    gone.insert(batch_of(gone.manifest, {"t": np.arange(2000, 2500)}))  # a fetch that was under way: too late
    assert not gone.held(np.arange(2000, 2500)).any()
    later.ask(np.arange(1000))
    assert cache.stats().releases == {"m@2": cache._owners.stats(later.tables)}
    assert cache.stats().releases["m@2"]["t"].entries == later.held(np.arange(2000)).sum()
    again = Asked(cache, manifest_of(table))
    assert not again.held(np.arange(2000)).any()  # and itself is no heir either
    gone.held(np.arange(2500))  # whoever still has it reads its rows, or nothing


def test_releases_come_and_go() -> None:
    rng = np.random.default_rng(5)
    cache = HotCache(40_000)
    live: list[Asked] = []
    for version in range(60):
        widths = rng.choice([16, 24, 40], 3)
        tables = [table_of(f"t{i}", int(rng.integers(10, 3000)), int(width)) for i, width in enumerate(widths)]
        live.append(Asked(cache, manifest_of(*tables, version=str(version), model=f"m{version % 2}")))
        if len(live) > 3:
            cache.forget(live.pop(0).manifest.name)
        for asked in live * 3:
            asked.ask(traffic(rng, asked.manifest))
        stats = cache.stats()
        assert set(stats.releases) == {asked.manifest.name for asked in live}
        assert stats.bytes <= 40_000
    for asked in live:
        for table in asked.manifest.tables:
            held = asked.held({table.name: np.arange(table.rows * 9 // 8 + 1)}).sum()
            assert stats.releases[asked.manifest.name][table.name].entries == held


def test_releases_that_came_and_went_leave_nothing_behind() -> None:
    cache = HotCache(100_000)
    table = table_of("t", 100, 24)
    sizes = set()
    for number in range(300):
        name = manifest_of(table, version=f"{number:03d}")
        cache.tables(name)
        cache.forget(name.name)
        if number >= 100:
            sizes.add(sum(len(held) for held in vars(cache._owners).values() if isinstance(held, dict)))
    assert sizes == {1}  # the model


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="-1 bytes; accepted: 0"):
        HotCache(-1)
    with pytest.raises(ValueError, match="'sieve' is unknown; accepted: lru, s3fifo"):
        HotCache(100, "sieve")
    many = manifest_of(*(table_of(f"t{i}", 1, 8) for i in range(1 << 14)))
    with pytest.raises(ValueError, match="at most 16383 tables"):
        HotCache(100).tables(many)
