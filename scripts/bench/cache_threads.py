"""Look-ups by one thread and by two at once, in one cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import IdBatch
from embedding_store.hot_cache import HotCache
from embedding_store.lookup import FOUND
from embedding_store.release import ReleaseManifest, TableInfo

TABLES, ROWS, HOT, WIDTH = 20, 100_000, 5000, 32
LOOKUP, BATCH = 2000, 10_000  # ids
_ROUNDS = 15

Call = Callable[[], object]


class Reader:
    """One thread's ids and buffers. A look-up's ids are spread over the tables."""

    def __init__(self, cache: HotCache, manifest: ReleaseManifest, seed: int, ids: int, hit_share: float) -> None:
        rng = np.random.default_rng(seed)
        self._cache, self._tables = cache, cache.tables(manifest)
        self._rows, self._status = np.zeros(ids * WIDTH, np.uint8), np.zeros(ids, np.uint8)
        self._starts = np.arange(TABLES) * (ids // TABLES * WIDTH)
        self._batches = []
        for _ in range(50):
            hot = rng.random(ids) < hit_share
            chosen = np.where(hot, rng.integers(0, HOT, ids), rng.integers(HOT, ROWS, ids))
            self._batches.append(IdBatch(np.arange(TABLES), np.full(TABLES, ids // TABLES), chosen))
        self._turn = 0

    def read(self) -> NDArray[np.int64]:
        self._turn = (self._turn + 1) % len(self._batches)
        return self._cache.probe(self._tables, self._batches[self._turn], self._rows, self._starts, self._status)

    def read_and_insert(self) -> None:
        misses = self._batches[self._turn].select(self.read())
        self._cache.insert(self._tables, misses, self._rows, np.full(len(misses.ids), FOUND, np.uint8))


def _seconds(work: list[Call], times: int, threads: ThreadPoolExecutor) -> float:
    """For each of the calls `times` times, all at once."""

    def repeat(call: Call) -> None:
        for _ in range(times):
            call()

    start = time.perf_counter()
    list(threads.map(repeat, work))
    return time.perf_counter() - start


def _speedup(calls: list[Call], times: int) -> float:
    """Look-ups a second of two threads beside those of one; the median of rounds in turns."""
    with ThreadPoolExecutor(2) as threads:
        _seconds(calls, 10, threads)  # compiles
        ratios = [2 * _seconds(calls[:1], times, threads) / _seconds(calls, times, threads) for _ in range(_ROUNDS)]
    return statistics.median(ratios)


def measure_threads(repeat: int, rng: np.random.Generator) -> dict[str, float]:
    tables = tuple(
        TableInfo(name=f"t{i}", rows=ROWS, dim=16, codec="fp16", row_bytes=WIDTH, page_rows=1, sha256="")
        for i in range(TABLES)
    )
    manifest = ReleaseManifest("bench", "1", "2026-01-01T00:00:00Z", tables)
    cache = HotCache(2 * TABLES * HOT * (WIDTH + 16))
    hot = IdBatch(np.arange(TABLES), np.full(TABLES, HOT), np.tile(np.arange(HOT), TABLES))
    rows = rng.integers(0, 256, TABLES * HOT * WIDTH, dtype=np.uint8)
    cache.insert(cache.tables(manifest), hot, rows, np.full(len(hot.ids), FOUND, np.uint8))

    request = Reader(cache, manifest, 0, LOOKUP, 0.95)
    times = []
    for _ in range(10 * repeat):
        start = time.perf_counter()
        request.read()
        times.append(time.perf_counter() - start)
    full = [Reader(cache, manifest, seed, BATCH, 1.0) for seed in (1, 2)]
    mixed = [Reader(cache, manifest, seed, LOOKUP, 0.95) for seed in (3, 4)]
    return {
        "lookup_us.2000_ids_20_tables": statistics.median(times) * 1e6,
        "threads_2.speedup": _speedup([reader.read for reader in full], repeat),
        "threads_2.speedup_with_inserts": _speedup([reader.read_and_insert for reader in mixed], 2 * repeat),
    }
