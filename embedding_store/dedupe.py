"""Distinct ids of a look-up, by a hash table that lives as long as the call."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def dedupe(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """ids int64 [n] -> unique int64 [m] in order of first appearance, index int64 [n] with unique[index] == ids.

    np.unique would sort: 8 times slower at the few hundred ids a request asks of a table (scripts/bench/cache.py).
    """
    n = len(ids)
    bits = 3
    while (1 << bits) < 2 * n:
        bits += 1
    shift = np.uint64(64 - bits)
    mask = (1 << bits) - 1
    slots = np.full(1 << bits, -1, np.int32)
    unique = np.empty(n, np.int64)
    index = np.empty(n, np.int64)
    count = 0
    for i in range(n):
        slot = np.int64((np.uint64(ids[i]) * np.uint64(0x9E3779B97F4A7C15)) >> shift)
        while slots[slot] >= 0 and unique[slots[slot]] != ids[i]:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = count
            unique[count] = ids[i]
            count += 1
        index[i] = slots[slot]
    return unique[:count], index


@njit(cache=True, nogil=True)
def dedupe_tables(
    ids: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """`dedupe` of each of t tables, whose ids int64 [n] lie one after another, counts int64 [t] of them per table.

    Returns the tables' unique ids one after another int64 [m], how many per table int64 [t], and the tables' index
    int64 [n], which counts from 0 in each table. One call instead of t, each of which takes 1.5 µs to enter.
    """
    unique = np.empty(len(ids), np.int64)
    distinct = np.empty(len(counts), np.int64)
    index = np.empty(len(ids), np.int64)
    start = written = 0
    for table in range(len(counts)):
        end = start + counts[table]
        found, places = dedupe(ids[start:end])
        unique[written : written + len(found)] = found
        index[start:end] = places
        distinct[table] = len(found)
        written += len(found)
        start = end
    return unique[:written], distinct, index
