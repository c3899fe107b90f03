"""Tables of raw 64-bit ids: the order of their rows, and how a row is found without an index.

Rows lie in ascending order of `mix(id)`, a bijection that spreads ids evenly over all 64 bits. So the rows of one
bucket (`buckets.py`) are neighbours in the file, and the place of an id can be guessed from its mix.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

NOT_THERE = -1

_U33 = np.uint64(33)
_PART_OF_ALL = 2.0**-64  # times the number of rows: where a mixed id is expected
_GUESSES = 32


@njit(cache=True, nogil=True, inline="always")
def mix(key: np.int64) -> np.uint64:
    """The finalizer of MurmurHash3 (fmix64): no two ids have the same."""
    mixed = np.uint64(key)
    mixed = (mixed ^ (mixed >> _U33)) * np.uint64(0xFF51AFD7ED558CCD)
    mixed = (mixed ^ (mixed >> _U33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return mixed ^ (mixed >> _U33)


@njit(cache=True, nogil=True)
def mixed_ids(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    mixed = np.empty(len(ids), np.uint64)
    for i in range(len(ids)):
        mixed[i] = mix(ids[i])
    return mixed


@njit(cache=True, nogil=True, inline="always")
def expected_row(key: np.int64, rows: int) -> int:
    """Where the id lies among so many in their order, or would lie: exact to some √rows places."""
    return int(np.float64(mix(key)) * (rows * _PART_OF_ALL))


@njit(cache=True, nogil=True)
def find_row(ids: NDArray[np.int64], key: np.int64) -> int:
    """The place of `key` among the ids of a table in their order, or NOT_THERE - p where it would be at place p.

    Mixed ids are spread evenly, so the first guess is off by about √n places and each further one by the root of that:
    two or three memory pages are touched, where a bisection would touch twenty.
    """
    wanted = mix(key)
    rows_per_mix = len(ids) * _PART_OF_ALL
    low, high = 0, len(ids)  # it can only be in low … high - 1
    guess = expected_row(key, len(ids))
    tries = 0
    while low < high:
        guess = min(max(guess, low), high - 1)
        if ids[guess] == key:
            return guess
        found = mix(ids[guess])
        if found < wanted:
            low = guess + 1
            guess += 1 + int(np.float64(wanted - found) * rows_per_mix)
        else:
            high = guess
            guess -= 1 + int(np.float64(found - wanted) * rows_per_mix)
        tries += 1
        if tries > _GUESSES:  # ids that were chosen to mix alike, or a damaged file
            guess = (low + high) // 2
    return NOT_THERE - low


@njit(cache=True, nogil=True)
def find_rows(ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """`find_row` of each: int64 [len(wanted)], negative where the table has no such id."""
    places = np.empty(len(wanted), np.int64)
    for i in range(len(wanted)):
        places[i] = find_row(ids, wanted[i])
    return places
