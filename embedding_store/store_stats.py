"""What a store counts, per release and table."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.backend import NodeStats
from embedding_store.batch import IdBatch
from embedding_store.cache_owners import TableStats
from embedding_store.lookup import ABSENT, FOUND, STALE, UNAVAILABLE
from embedding_store.misses import MissStats
from embedding_store.release import ReleaseManifest

_STATUSES = 4


@njit(cache=True, nogil=True)
def _count_status(tables, counts, status, totals):  # type: ignore[no-untyped-def]
    i = 0
    for k in range(len(tables)):
        for _ in range(counts[k]):
            totals[tables[k], status[i]] += 1
            i += 1


@njit(cache=True, nogil=True)
def _count_raw(tables, asked, distinct, index, missed, raw, raw_misses):  # type: ignore[no-untyped-def]
    """missed: bool [Σ distinct]. index counts from 0 in each table."""
    i = first = 0
    for k in range(len(tables)):
        raw[tables[k]] += asked[k]
        for _ in range(asked[k]):
            raw_misses[tables[k]] += missed[first + index[i]]
            i += 1
        first += distinct[k]


class RowCounts:
    """Of one release. Thread-safe."""

    def __init__(self, tables: int) -> None:
        self._status = np.zeros((tables, _STATUSES), np.int64)
        self._raw = np.zeros((2, tables), np.int64)  # ids as asked, those of them that missed
        self._lock = threading.Lock()

    def answered(self, batch: IdBatch, status: NDArray[np.uint8]) -> None:
        """One look-up's rows, status uint8 [n]."""
        with self._lock:
            _count_status(batch.tables, batch.counts, status, self._status)

    def asked(
        self, asked: IdBatch, distinct: IdBatch, index: NDArray[np.int64], misses: NDArray[np.int64] | None
    ) -> None:
        """One look-up's ids before deduplication; misses: positions among the distinct ones."""
        missed = np.zeros(len(distinct.ids), np.bool_)
        if misses is not None:
            missed[misses] = True
        with self._lock:
            _count_raw(asked.tables, asked.counts, distinct.counts, index, missed, self._raw[0], self._raw[1])

    def status(self) -> NDArray[np.int64]:
        """int64 [tables, 4]: rows answered, by status."""
        with self._lock:
            return self._status.copy()

    def raw(self) -> NDArray[np.int64]:
        """int64 [2, tables]: ids as asked, and those of them that the cache did not have."""
        with self._lock:
            return self._raw.copy()


@dataclass(frozen=True, slots=True)
class TableCounts:
    """One table of one release. Distinct ids of a look-up where it says nothing else."""

    hits: int
    misses: int
    raw_ids: int  # as asked, duplicates and all; 0 where whoever asks has made them distinct
    raw_misses: int
    found: int  # rows answered, by status, and so on
    absent: int
    unavailable: int
    stale: int
    evictions: int
    rejected: int  # fetched rows that the cache did not admit
    entries: int

    @property
    def hit_rate(self) -> float:
        """0 … 1; 0 before the first look-up."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def raw_hit_rate(self) -> float:
        return (self.raw_ids - self.raw_misses) / max(1, self.raw_ids)


def table_counts(
    manifest: ReleaseManifest, rows: RowCounts, cached: Mapping[str, TableStats]
) -> dict[str, TableCounts]:
    """By table of one release; cached: what the cache counted, nothing where it does not know the release."""
    status, (raw, raw_misses) = rows.status(), rows.raw()
    counts = {}
    for place, table in enumerate(manifest.tables):
        cache = cached.get(table.name, TableStats(0, 0, 0, 0, 0, 0))
        counts[table.name] = TableCounts(
            hits=cache.hits,
            misses=cache.misses,
            raw_ids=int(raw[place]),
            raw_misses=int(raw_misses[place]),
            found=int(status[place, FOUND]),
            absent=int(status[place, ABSENT]),
            unavailable=int(status[place, UNAVAILABLE]),
            stale=int(status[place, STALE]),
            evictions=cache.evictions,
            rejected=cache.rejected,
            entries=cache.entries,
        )
    return counts


def totals(tables: Iterable[TableCounts], misses: MissStats) -> Counter[str]:
    """One release's counters, by name: everything that only grows."""
    total = Counter(asdict(misses))
    for table in tables:
        total.update(asdict(table))
    del total["entries"]
    return total


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Since the store was opened."""

    address: str
    cache_budget: int  # bytes
    cache_bytes: int  # allocated
    releases: Mapping[str, Mapping[str, TableCounts]]  # by release, by table
    misses: Mapping[str, MissStats]  # by release
    forgotten: Mapping[str, int]  # counters of the releases that are not among these any more, see `totals`
    waiting: int  # ids in the queues at this moment
    nodes: tuple[NodeStats, ...]

    def total(self, counter: str) -> int:
        """Of one of TableCounts' or MissStats' counters, over tables and releases, also those that were forgotten: it
        never falls."""
        tables = (table for tables in self.releases.values() for table in tables.values())
        parts: Iterable[object] = self.misses.values() if hasattr(MissStats, counter) else tables
        return self.forgotten.get(counter, 0) + sum(int(getattr(part, counter)) for part in parts)

    @property
    def hit_rate(self) -> float:
        """0 … 1 per distinct id; 0 before the first look-up."""
        hits = self.total("hits")
        return hits / max(1, hits + self.total("misses"))
