"""A growing set of (table, id), each with a number in order of arrival, in flat arrays."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.batch import IdBatch

_FIRST_SIZE = 64


@njit(cache=True, nogil=True)
def _seat(slots, places, ids, count, tables, counts, asked, seats, take):  # type: ignore[no-untyped-def]
    """seats[i] = number of (its table, asked[i]) among the first `count`; who has none gets one if `take`, else -1.
    Returns the new count. slots: open addressing over a power of two, -1 is free."""
    mask = len(slots) - 1
    i = 0
    for k in range(len(counts)):
        for _ in range(counts[k]):
            key = np.uint64(asked[i]) * np.uint64(0x9E3779B97F4A7C15)
            key = (key ^ np.uint64(tables[k])) * np.uint64(0xBF58476D1CE4E5B9)
            slot = np.int64(key >> np.uint64(32)) & mask
            while slots[slot] >= 0 and (ids[slots[slot]] != asked[i] or places[slots[slot]] != tables[k]):
                slot = (slot + 1) & mask
            if slots[slot] < 0 and take:
                slots[slot] = count
                places[count] = tables[k]
                ids[count] = asked[i]
                count += 1
            seats[i] = slots[slot]
            i += 1
    return count


class Seats:
    """Not thread-safe: its owner has a lock."""

    def __init__(self) -> None:
        self._count = 0
        self._places = np.empty(_FIRST_SIZE, np.int64)  # of the tables in the manifest
        self._ids = np.empty(_FIRST_SIZE, np.int64)
        self._slots = np.full(2 * _FIRST_SIZE, -1, np.int32)

    def __len__(self) -> int:
        return self._count

    def find(self, batch: IdBatch) -> NDArray[np.int64]:
        """int64 [n]: the seat of each id, -1 where it has none."""
        return self._seat(batch, take=False)

    def take(self, batch: IdBatch) -> NDArray[np.int64]:
        """int64 [n]: the seat of each id; those that had none get one."""
        if self._count + len(batch.ids) > len(self._ids):
            self._grow(self._count + len(batch.ids))
        return self._seat(batch, take=True)

    def batch(self) -> tuple[IdBatch, NDArray[np.int64]]:
        """All ids, table by table, and the position there of each seat, int64 [seats]."""
        places = self._places[: self._count]
        order = np.argsort(places, kind="stable")
        tables, counts = np.unique(places, return_counts=True)
        position = np.empty(self._count, np.int64)
        position[order] = np.arange(self._count)
        return IdBatch(tables, counts.astype(np.int64), self._ids[: self._count][order]), position

    def _seat(self, batch: IdBatch, *, take: bool) -> NDArray[np.int64]:
        seats = np.empty(len(batch.ids), np.int64)
        self._count = _seat(
            self._slots, self._places, self._ids, self._count, batch.tables, batch.counts, batch.ids, seats, take
        )
        return seats

    def _grow(self, least: int) -> None:
        size = 1 << (least - 1).bit_length()
        known = IdBatch(
            self._places[: self._count], np.ones(self._count, np.int64), self._ids[: self._count]
        )  # a "table" per id: in order of arrival, so that every id gets the seat it had
        self._places, self._ids = np.empty(size, np.int64), np.empty(size, np.int64)
        self._slots = np.full(2 * size, -1, np.int32)
        self._count = 0
        self._seat(known, take=True)
