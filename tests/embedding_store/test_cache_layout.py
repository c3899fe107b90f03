"""How the budget is divided over row widths, and what becomes of the entries when it is divided anew."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from embedding_store.cache_layout import divide, plan
from embedding_store.cache_set import WAYS, set_bytes
from embedding_store.hot_cache import HotCache
from tests.embedding_store.cached_rows import Asked, manifest_of, table_of


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_divided_by_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    need = {int(width): int(10 ** rng.uniform(3, 8)) for width in rng.permutation(200)[:12]}
    for part in (0.0, 0.01, 0.3, 0.999, 1.0, 2.0):
        budget = int(part * sum(need.values()))
        shares = divide(need, budget)
        assert sum(shares.values()) <= budget
        assert all(shares[width] <= size for width, size in need.items())
        cut = [width for width in need if shares[width] < need[width]]
        assert bool(cut) == (part < 1)
        if budget:
            small = [width for width, size in need.items() if size <= budget // (4 * len(need))]
            assert not set(small) & set(cut)  # a fraction would be of no use to them
        ratios = np.array([shares[width] / need[width] for width in cut])
        assert np.ptp(ratios) < 1e-2 if cut else part >= 1


def test_another_release_of_a_model_takes_nothing_from_other_widths() -> None:
    first = [
        manifest_of(table_of("t", 100_000, 32), table_of("u", 50_000, 64)),
        manifest_of(table_of("t", 9000, 16), model="x"),
    ]
    more = [*first, manifest_of(table_of("t", 100_000, 32), table_of("u", 50_000, 64), version="2")]
    scarce = 3_000_000
    assert plan(first, scarce) == plan(more, scarce)
    plenty = 100_000_000
    assert plan(more, plenty)[32] >= 2 * plan(first, plenty)[32] - 1
    assert plan(more, plenty)[16] == plan(first, plenty)[16]


def whole(asked: Asked) -> dict[str, np.ndarray]:
    return {table.name: np.arange(-200, table.rows) for table in asked.manifest.tables}


def assert_consistent(cache: HotCache, releases: list[Asked]) -> None:
    """Every row that is found is right, entries are as many as are found, and all within the budget."""
    stats = cache.stats()
    assert stats.bytes <= cache._layout.memory.nbytes <= stats.budget
    for asked in releases:
        for name, ids in whole(asked).items():
            assert stats.releases[asked.manifest.name][name].entries == asked.held({name: ids}).sum()


@pytest.mark.parametrize("seed", range(8))
def test_entries_stay_when_widths_come(seed: int) -> None:
    """The memory is divided anew with nearly each of these; the parts shrink, move and grow."""
    rng = np.random.default_rng(seed)
    cache = HotCache(int(rng.integers(20_000, 400_000)))
    releases: list[Asked] = []
    for number in range(8):
        tables = [table_of(f"t{i}", int(rng.integers(50, 4000)), int(rng.integers(1, 12)) * 8) for i in range(3)]
        releases.append(Asked(cache, manifest_of(*tables, model=f"m{number}")))
        assert_consistent(cache, releases)
        for asked in releases:
            asked.ask(whole(asked))
            asked.ask({table.name: rng.integers(0, table.rows, 300) for table in tables[:2] if asked is releases[-1]})
        if number % 3 == 2:
            cache.forget(releases.pop(int(rng.integers(len(releases)))).manifest.name)
    assert_consistent(cache, releases)


def test_the_most_used_entries_stay() -> None:
    cache = HotCache(1000 * set_bytes(32))
    asked = Asked(cache, manifest_of(table_of("t", 7500, 32)))
    ids = np.random.default_rng(0).permutation(7500)
    asked.ask(ids)
    hot = ids[:2000]
    for _ in range(3):
        asked.ask(hot)
    sets = cache.stats().capacity // WAYS
    Asked(cache, manifest_of(table_of("t", 9000, 48), model="other"))
    left = cache._layout.classes[0, 1]
    assert 0.3 * sets < left < 0.5 * sets
    assert asked.held(hot).mean() > 0.95
    assert asked.held(ids).sum() > 0.8 * left * WAYS


def test_what_a_model_leaves_goes_to_the_others() -> None:
    cache = HotCache(300_000)
    asked = Asked(cache, manifest_of(table_of("t", 5000, 32)))
    cache.tables(manifest_of(table_of("t", 20_000, 64), model="other"))
    asked.ask(np.arange(5000))
    held, before = asked.held(np.arange(5000)), cache.stats().bytes
    cache.forget("other@1")
    asked.ask(np.arange(5000))
    assert asked.held(np.arange(5000)).sum() > 3 * held.sum()
    assert cache.stats().bytes <= before


def test_nothing_is_lost_by_growing() -> None:
    cache = HotCache(4_000_000)
    old = Asked(cache, manifest_of(table_of("t", 10_000, 32), table_of("wide", 1000, 64)))
    old.ask(whole(old))
    held = old.held(whole(old))
    assert held.mean() > 0.97  # all but absent ids that met
    before = cache.stats().capacity
    new = Asked(cache, manifest_of(table_of("t", 10_000, 32), table_of("wide", 1000, 64), version="2"))
    assert cache.stats().capacity > 1.9 * before
    np.testing.assert_array_equal(old.held(whole(old)), held)
    rows = {"t": np.arange(10_000), "wide": np.arange(1000)}
    new.ask(rows)
    assert old.held(rows).mean() > 0.98
    assert new.held(rows).mean() > 0.99


def test_releases_that_are_expected_together_share_from_the_start() -> None:
    first, second = manifest_of(table_of("t", 5000, 32), model="a"), manifest_of(table_of("t", 5000, 64), model="b")
    cache = HotCache(200_000)
    cache.expect([first, second])
    sets = cache._layout.classes[:, 1].copy()
    assert (sets > 0).all()
    asked = Asked(cache, first)
    asked.ask(np.arange(5000))
    Asked(cache, second)
    np.testing.assert_array_equal(cache._layout.classes[:, 1], sets)


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_is_taken_as_it_is_written_to() -> None:
    Asked(HotCache(10_000), manifest_of(table_of("t", 9, 64))).ask(np.arange(9))  # compiling takes memory, too
    before = resident()
    asked = Asked(HotCache(4 << 30), manifest_of(table_of("t", 200_000_000, 64)))
    asked.ask(np.arange(1000))
    assert asked.held(np.arange(1000)).all()
    assert asked.cache.stats().bytes > 4_000_000_000
    assert resident() - before < 32 << 20
