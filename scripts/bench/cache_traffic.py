"""Simulated traffic for the hot-id cache, and what share of it a cache answers."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import IdBatch
from embedding_store.cache_set import WAYS, set_bytes
from embedding_store.hot_cache import HotCache
from embedding_store.release import ReleaseManifest, TableInfo

Ids = NDArray[np.int64]


def hit_rate(policy: str, ids: Ids, entries: int, *, batch: int) -> float:
    """0 … 1 of raw ids, over the second half; a batch is probed, duplicates and all, and then its misses inserted."""
    cache = HotCache(entries // WAYS * set_bytes(8) + 64, policy)
    table = TableInfo("t", rows=int(ids.max()) + 1, dim=2, codec="fp32", row_bytes=8, page_rows=1, sha256="")
    tables = cache.tables(ReleaseManifest("traffic", "1", "2026-01-01T00:00:00Z", (table,)))
    assert cache.stats().capacity == entries, "entries must be a multiple of 8"
    place, start = np.zeros(1, np.int64), np.zeros(1, np.int64)
    rows, status = np.zeros(8 * batch, np.uint8), np.zeros(batch, np.uint8)
    hits = 0
    for number, part in enumerate(ids.reshape(-1, batch)):
        misses = cache.probe(tables, IdBatch(place, np.array([batch]), part), rows, start, status)
        cache.insert(tables, IdBatch(place, np.array([len(misses)]), part[misses]), rows, status)
        hits += (batch - len(misses)) * (number >= len(ids) // batch // 2)
    return 2 * hits / len(ids)


def exact_lru(ids: Ids, entries: int) -> float:
    """The same of one LRU list over all entries."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number, key in enumerate(ids.tolist()):
        if key in kept:
            kept.move_to_end(key)
            hits += number >= len(ids) // 2
            continue
        kept[key] = None
        if len(kept) > entries:
            kept.popitem(last=False)
    return 2 * hits / len(ids)


def static_top(ids: int, exponent: float, entries: int) -> float:
    """The rate of a cache that holds the most frequent ids: no other does better when these stay the same."""
    weights = np.arange(1, ids + 1) ** -exponent
    return float(weights[:entries].sum() / weights.sum())


def ranks(rng: np.random.Generator, ids: int, exponent: float, count: int) -> Ids:
    """Ranks 0 … ids-1, rank r with a probability in proportion to (r + 1) ** -exponent."""
    cumulative = np.cumsum(np.arange(1, ids + 1) ** -exponent)
    return np.searchsorted(cumulative, rng.random(count) * cumulative[-1])


def moving(rng: np.random.Generator, ids: int, count: int, *, hottest: int) -> Ids:
    """Zipf 1.05; every 40,000 requests the `hottest` ranks change places with as many colder ones, or, if these are all
    ids, all ranks go to other ids."""
    drawn = ranks(rng, ids, 1.05, count)
    of_rank = rng.permutation(ids)
    for part in drawn.reshape(-1, 40_000):
        others = rng.permutation(np.arange(hottest % ids, ids))[:hottest]
        of_rank[others], of_rank[:hottest] = of_rank[:hottest].copy(), of_rank[others].copy()
        part[:] = of_rank[part]
    return drawn
