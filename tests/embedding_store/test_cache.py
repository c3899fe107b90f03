"""The hot-id cache against models of dicts: right rows, the predicted evictions, the byte bound, many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.cache import WAYS, TableCache, entry_bytes, full_bytes
from embedding_store.caches import divide
from embedding_store.dedupe import dedupe
from embedding_store.lookup import ABSENT, FOUND
from embedding_store.policy import ABSENT_WAYS, LAST_TICK
from embedding_store.release import TableInfo

WIDTH = 24


def table_of(rows: int, *, width: int = WIDTH, name: str = "t") -> TableInfo:
    return TableInfo(
        name=name, rows=rows, dim=width // 4, codec="fp32", row_bytes=width, page_rows=1, sha256="",
        default_row=bytes([9]) * width,
    )  # fmt: skip


def row_of(ids: NDArray[np.int64], width: int = WIDTH) -> NDArray[np.uint8]:
    """The row of an id is told by the id, so that a wrong one shows."""
    return ((ids[:, None] * 2654435761 + np.arange(width)) >> 7 & 0xFF).astype(np.uint8)


def ask(cache: TableCache, rows: int, ids: NDArray[np.int64], *, insert: bool = True) -> NDArray[np.bool_]:
    """Probe, check what hit, insert the rest; returns which ids hit."""
    got, status = np.full((len(ids), WIDTH), 255, np.uint8), np.full(len(ids), 255, np.uint8)
    misses = cache.probe(ids, got, status)
    hit = np.ones(len(ids), np.bool_)
    hit[misses] = False
    found = (ids >= 0) & (ids < rows)
    np.testing.assert_array_equal(status[hit], np.where(found[hit], FOUND, ABSENT))
    np.testing.assert_array_equal(got[hit], np.where(found[hit, None], row_of(ids[hit]), 9))
    assert (status[~hit] == 255).all()
    if insert:
        cache.insert(ids[misses], row_of(ids[misses]), found[misses])
    return hit


class SetModel:
    """One set: ids in the order of their last use, oldest first, with whether the table has them."""

    def __init__(self) -> None:
        self.ids: dict[int, bool] = {}

    def ask(self, key: int, found: bool) -> bool:
        if key in self.ids:
            self.ids[key] = self.ids.pop(key)
            return True
        absent = [old for old, known in self.ids.items() if not known]
        if len(self.ids) == WAYS or (not found and len(absent) >= ABSENT_WAYS):
            del self.ids[absent[0] if not found and len(absent) >= ABSENT_WAYS else next(iter(self.ids))]
        self.ids[key] = found
        return False


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sets", [1, 3, 20])
def test_every_hit_and_eviction_is_the_models(seed: int, sets: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 1000
    cache = TableCache(table_of(rows), sets * WAYS * entry_bytes(WIDTH) + 200)
    assert cache.sets == sets
    models = [SetModel() for _ in range(sets)]
    hits = 0
    for key in (rng.zipf(1.3, 4000) * 37 % (rows + rows // 4)).tolist():
        place = _place(key, sets)
        expected = models[place].ask(key, key < rows)
        assert ask(cache, rows, np.array([key]))[0] == expected
        hits += expected
    stats = cache.stats()
    held = sum(len(model.ids) for model in models)
    assert (stats.hits, stats.misses, stats.entries) == (hits, 4000 - hits, held)
    assert stats.evictions == stats.misses - held


def _place(key: int, sets: int) -> int:
    """The set of an id, in Python's integers."""
    mixed = key * 0x9E3779B97F4A7C15 % 2**64
    mixed ^= mixed >> 29
    mixed = mixed * 0xBF58476D1CE4E5B9 % 2**64
    return (mixed >> 32) * sets >> 32


def test_a_cache_for_the_whole_table_never_evicts() -> None:
    rng = np.random.default_rng(0)
    rows = 1003
    cache = TableCache(table_of(rows), full_bytes(table_of(rows)))
    ask(cache, rows, rng.permutation(rows))
    assert ask(cache, rows, rng.permutation(rows)).all()
    assert cache.stats().evictions == 0
    assert cache.stats().entries == rows


@pytest.mark.parametrize("budget", [0, 100, 500, 10_000, 123_456])
def test_the_budget_holds(budget: int) -> None:
    cache = TableCache(table_of(100_000), budget)
    rng = np.random.default_rng(budget)
    for _ in range(20):
        ask(cache, 100_000, np.unique(rng.integers(0, 120_000, 1000)))
    held = 0
    for array in (cache._tags, cache._stamps, cache._data):
        owner = array.base  # the buffer that the aligned view was cut from
        assert isinstance(owner, np.ndarray)
        held += owner.nbytes if array.size else 0
    assert held <= cache.bytes <= budget
    assert budget - cache.bytes < WAYS * entry_bytes(WIDTH) + 200
    assert cache.stats().entries <= cache.capacity


def test_absent_ids_take_a_quarter_at_most() -> None:
    rows = 400
    cache = TableCache(table_of(100_000), 50 * WAYS * entry_bytes(WIDTH) + 200)
    ask(cache, 100_000, np.arange(rows))
    before = ask(cache, 100_000, np.arange(rows), insert=False).sum()
    ask(cache, 100_000, np.arange(-20_000, 0))
    after = ask(cache, 100_000, np.arange(rows), insert=False).sum()
    absent = ask(cache, 100_000, np.arange(-20_000, 0), insert=False).sum()
    assert absent == 50 * ABSENT_WAYS
    assert after >= before - absent


def test_ids_of_any_value() -> None:
    cache = TableCache(table_of(2000), full_bytes(table_of(2000)))
    ids = np.array([-(2**63), -(2**63) + 1, -1, 0, 1999, 2000, 2**62, 2**63 - 1])
    assert not ask(cache, 2000, ids).any()
    assert ask(cache, 2000, ids)[1:].all()
    assert not ask(cache, 2000, ids)[0]  # the tag of an empty way


def test_warming_displaces_nothing() -> None:
    cache = TableCache(table_of(100_000), 50 * WAYS * entry_bytes(WIDTH) + 200)
    hot = np.random.default_rng(1).permutation(100_000)[:1000]
    for part in np.array_split(hot, 10):
        cache.insert(part, row_of(part), np.ones(len(part), np.bool_), only_empty=True)
    assert cache.stats().evictions == 0
    hit = ask(cache, 100_000, hot, insert=False)
    assert hit.sum() == cache.stats().entries
    assert hit[:100].all()  # the hottest came first


def test_when_the_clock_runs_out() -> None:
    cache = TableCache(table_of(1000), WAYS * entry_bytes(WIDTH) + 200)
    ask(cache, 1000, np.arange(WAYS))
    cache._tick = LAST_TICK - 1
    assert ask(cache, 1000, np.array([0])).all()
    assert ask(cache, 1000, np.arange(WAYS)).all()
    assert not ask(cache, 1000, np.array([500])).any()
    assert ask(cache, 1000, np.arange(WAYS), insert=False).sum() == WAYS - 1


@pytest.mark.parametrize("whole", [False, True])
def test_threads_never_see_a_wrong_row(whole: bool) -> None:
    rows = 3000
    table = table_of(rows)
    cache = TableCache(table, full_bytes(table) if whole else 600 * entry_bytes(WIDTH))

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        asked = 0
        for _ in range(300):
            ids = np.unique((rng.zipf(1.2, 200) * 31) % (rows + 100))
            ask(cache, rows, ids)
            asked += len(ids)
        return asked

    with ThreadPoolExecutor(4) as threads:
        asked = sum(threads.map(work, range(4)))
    stats = cache.stats()
    assert stats.hits + stats.misses == asked
    assert stats.entries <= cache.capacity


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_divided_by_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [table_of(int(rows), width=int(width), name=f"t{i}") for i, (rows, width) in enumerate(
        zip(10 ** rng.uniform(0, 6, 12), 4 * rng.integers(1, 40, 12), strict=True)
    )]  # fmt: skip
    need = {table.name: full_bytes(table) for table in tables}
    for part in (0.0, 0.01, 0.3, 0.999, 1.0, 2.0):
        budget = int(part * sum(need.values()))
        shares = divide(tables, budget)
        assert sum(shares.values()) <= max(budget, 0)
        assert all(shares[name] <= size for name, size in need.items())
        if part >= 1:
            assert shares == need
        else:
            cut = [name for name in need if shares[name] < need[name]]
            ratios = np.array([(shares[name] + 1) / need[name] for name in cut])
            np.testing.assert_allclose(ratios, ratios[0], atol=1e-2)


@pytest.mark.parametrize("seed", range(20))
def test_dedupe(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.choice(
        np.concatenate((rng.integers(-(2**63), 2**63 - 1, 50), np.arange(20) * 2**40, [-1, 0, 2**63 - 1, -(2**63)])),
        int(rng.integers(0, 500)),
    )
    unique, index = dedupe(ids)
    np.testing.assert_array_equal(unique[index], ids)
    assert unique.tolist() == list(dict.fromkeys(ids.tolist()))
