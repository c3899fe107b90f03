"""Which entry of a set makes room: the seam at which a better admission or eviction rule is put in.

A set is one row of `stamps`, uint32 [ways]: 0 is an empty way, else when it was last used, with the top bit set for an
id that the table does not have. Kernels call `touch` on a hit and `victim` for an entry that is not there yet.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

EMPTY = np.uint32(0)
ABSENT_BIT = np.uint32(1 << 31)
LAST_TICK = (1 << 31) - 1
ABSENT_WAYS = 2  # of 8: ids that do not exist may take a quarter of the cache, not more


@njit(cache=True, nogil=True, inline="always")
def touch(stamp: np.uint32, tick: np.uint32) -> np.uint32:
    """The stamp of a way that was used at `tick`, 1 … LAST_TICK."""
    return np.uint32((stamp & ABSENT_BIT) | tick)


@njit(cache=True, nogil=True)
def victim(stamps: NDArray[np.uint32], absent: bool) -> int:
    """Least recently used, empty ways first; an absent id displaces another one where the set has its fill of them."""
    absent_ways = 0
    for way in range(len(stamps)):
        absent_ways += int(stamps[way] >> np.uint32(31))
    only_absent = absent and absent_ways >= ABSENT_WAYS
    chosen = -1
    oldest = np.uint32(LAST_TICK + 1)
    for way in range(len(stamps)):
        if only_absent and not stamps[way] & ABSENT_BIT:
            continue
        age = np.uint32(stamps[way] & np.uint32(LAST_TICK))
        if age < oldest:
            chosen, oldest = way, age
    return chosen
