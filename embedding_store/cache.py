"""TableCache: encoded rows of one table, 8-way set-associative, in four flat arrays.

An id belongs to one set of 8 ways; tags of a set fill one cache line. No Python object per entry, so a byte budget is
a number of sets, and the bound holds exactly. The kernels run without the interpreter lock, under a lock per table.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.lookup import ABSENT, FOUND
from embedding_store.policy import ABSENT_BIT, EMPTY, LAST_TICK, touch, victim
from embedding_store.release import TableInfo

WAYS = 8
BLANK = np.int64(-(2**63))  # the tag of an empty way; this one id is never kept
_ALIGN = 64
_FIXED_BYTES = 3 * _ALIGN  # lost to the alignment of the arrays
# counters
HITS, MISSES, EVICTIONS, ABSENTS, ENTRIES = 0, 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class TableStats:
    """Counted per distinct id of a look-up: hits + misses = ids asked; `absent` of them the table does not have."""

    hits: int
    misses: int
    absent: int
    evictions: int
    entries: int
    capacity: int  # entries
    bytes: int  # allocated, tags and all


def entry_bytes(row_bytes: int) -> int:
    return row_bytes + 8 + 4  # row, tag, stamp


def full_bytes(table: TableInfo) -> int:
    """What a cache takes that can hold every row of `table`."""
    return -(-table.rows // WAYS) * WAYS * entry_bytes(table.row_bytes) + _FIXED_BYTES


@njit(cache=True, nogil=True, inline="always")
def _set_of(key: np.int64, sets: int, whole: bool) -> np.int64:
    """A cache for the whole table gives each 8 ids in a row their set, so that no id of the table displaces another;
    a smaller one scatters them, so that no stride of hot ids meets in one set."""
    if whole:
        eighth = np.uint64(key) >> np.uint64(3)
        if eighth < np.uint64(sets):
            return np.int64(eighth)
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.int64(((mixed >> np.uint64(32)) * np.uint64(sets)) >> np.uint64(32))


@njit(cache=True, nogil=True, inline="always")
def _entry_of(tags, place, key):  # type: ignore[no-untyped-def]
    """-1 where it is not there. All ways are compared, without a branch: which one it is cannot be predicted, and a
    wrong guess would keep the next id's memory from being fetched meanwhile."""
    found = -1
    for way in range(WAYS):
        found = way if tags[place, way] == key else found
    return place * WAYS + found if found >= 0 and key != BLANK else -1


@njit(cache=True, nogil=True)
def _probe(tags, stamps, data, whole, tick, ids, default, rows, status, misses, counters):  # type: ignore[no-untyped-def]
    """Copies hits into rows and status, writes the positions of the others to misses; returns how many.

    Two passes, tags and then rows: half the time of one, because the processor has more fetches from memory under way.
    """
    sets = len(tags)
    width = rows.shape[1]
    entries = np.empty(len(ids), np.int64)
    for i in range(len(ids)):
        entries[i] = _entry_of(tags, _set_of(ids[i], sets, whole), ids[i]) if sets else -1
    missed = 0
    flat = stamps.reshape(-1)
    for i in range(len(ids)):
        entry = entries[i]
        if entry < 0:
            misses[missed] = i
            missed += 1
            continue
        flat[entry] = touch(flat[entry], tick)
        if flat[entry] & ABSENT_BIT:
            status[i] = ABSENT
            counters[ABSENTS] += 1
            row = default
        else:
            status[i] = FOUND
            row = data[entry]
        for byte in range(width):
            rows[i, byte] = row[byte]
    counters[HITS] += len(ids) - missed
    counters[MISSES] += missed
    return missed


@njit(cache=True, nogil=True)
def _insert(tags, stamps, data, whole, tick, ids, rows, found, only_empty, counters):  # type: ignore[no-untyped-def]
    flat = stamps.reshape(-1)
    for i in range(len(ids)):
        place = _set_of(ids[i], len(tags), whole)
        entry = _entry_of(tags, place, ids[i])  # another thread may have brought it meanwhile
        if ids[i] == BLANK:
            continue
        if entry < 0:
            entry = place * WAYS + victim(stamps[place], not found[i])
            if flat[entry] == EMPTY:
                counters[ENTRIES] += 1
            elif only_empty:
                continue
            else:
                counters[EVICTIONS] += 1
        tags[place, entry % WAYS] = ids[i]
        flat[entry] = tick if found[i] else tick | ABSENT_BIT
        if found[i]:
            row = data[entry]
            for byte in range(len(row)):
                row[byte] = rows[i, byte]


class TableCache:
    """Thread-safe. `budget` in bytes bounds everything it allocates; too small a budget gives a cache of nothing.

    Counting goes on where `before`, the same table's cache of another size, left off.
    """

    def __init__(self, table: TableInfo, budget: int, before: TableCache | None = None) -> None:
        whole_sets = -(-table.rows // WAYS)
        affordable = max(0, budget - _FIXED_BYTES) // (WAYS * entry_bytes(table.row_bytes))
        self.sets = min(whole_sets, affordable)
        self._whole = self.sets == whole_sets
        self._tags = _aligned(self.sets * WAYS * 8).view(np.int64).reshape(self.sets, WAYS)
        self._stamps = _aligned(self.sets * WAYS * 4).view(np.uint32).reshape(self.sets, WAYS)
        self._tags[:] = BLANK
        self._stamps[:] = EMPTY
        self._data = _aligned(self.sets * WAYS * table.row_bytes).reshape(self.sets * WAYS, table.row_bytes)
        self._default = default_row(table)
        self._counters = np.zeros(5, np.int64) if before is None else before.counters()
        self._counters[ENTRIES] = 0
        self._tick = 0
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Entries."""
        return self.sets * WAYS

    @property
    def bytes(self) -> int:
        if not self.sets:
            return 0
        return self._tags.nbytes + self._stamps.nbytes + self._data.nbytes + _FIXED_BYTES

    def probe(self, ids: NDArray[np.int64], rows: NDArray[np.uint8], status: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Fills rows uint8 [n, row_bytes] and status uint8 [n] for the distinct ids int64 [n] that are here.

        Returns the positions of the others, int64 [k], whose rows and status it leaves alone.
        """
        misses = np.empty(len(ids), np.int64)
        with self._lock:
            missed = _probe(
                self._tags, self._stamps, self._data, self._whole, self._next_tick(),
                ids, self._default, rows, status, misses, self._counters,
            )  # fmt: skip
        return misses[:missed]

    def insert(
        self, ids: NDArray[np.int64], rows: NDArray[np.uint8], found: NDArray[np.bool_], *, only_empty: bool = False
    ) -> None:
        """Keeps what a backend answered. `only_empty` (warming, hottest first) displaces nothing."""
        if not self.sets:
            return
        with self._lock:
            _insert(
                self._tags, self._stamps, self._data, self._whole, self._next_tick(),
                ids, rows, found, only_empty, self._counters,
            )  # fmt: skip

    def count_absent(self, ids: int) -> None:
        with self._lock:
            self._counters[ABSENTS] += ids

    def counters(self) -> NDArray[np.int64]:
        """A copy: int64 [5], by HITS … ENTRIES."""
        with self._lock:
            return self._counters.copy()

    def stats(self) -> TableStats:
        hits, misses, evictions, absent, entries = (int(value) for value in self.counters())
        return TableStats(hits, misses, absent, evictions, entries, self.capacity, self.bytes)

    def _next_tick(self) -> np.uint32:
        """One tick a look-up. When they run out, all entries become equally old."""
        if self._tick == LAST_TICK:
            used = self._stamps != EMPTY
            self._stamps[used] = (self._stamps[used] & ABSENT_BIT) | np.uint32(1)
            self._tick = 1
        self._tick += 1
        return np.uint32(self._tick)


def default_row(table: TableInfo) -> NDArray[np.uint8]:
    """uint8 [row_bytes]."""
    if not table.default_row:
        return np.zeros(table.row_bytes, np.uint8)
    return np.frombuffer(table.default_row, np.uint8).copy()  # writable, as zeros are: one type for the kernels


def _aligned(size: int) -> NDArray[np.uint8]:
    """uint8 [size] on a cache line boundary; pages that nothing was written to take no memory yet."""
    buffer = np.empty(size + _ALIGN, np.uint8)
    start = -buffer.ctypes.data % _ALIGN
    return buffer[start : start + size]
