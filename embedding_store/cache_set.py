"""One set of the hot-id cache: 8 ways in one block of memory, and how it is read while somebody writes.

    byte   0   id of each way, int64
          64   owner of each way, uint32: release and table; 0 is an empty way
          96   version, uint32: odd while somebody writes
         100   order of the ways, 8 nibbles, oldest lowest; kept xor 0x76543210, so that zeros are an order
         104   uses of each way since it was put in or passed over, uint8
         112   ways on probation, a bit each
         113   ways whose id the table does not have, a bit each
         116   ghosts: fingerprints of the last 6 that left from probation, uint16, latest first
         128   row of each way

Blocks begin on cache lines: an id and whose it is are in the two lines that processors fetch together. Memory of zeros
is a set with nothing in it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from embedding_store.cache_memory import (
    equal8,
    fence_release,
    load8,
    load16,
    load32,
    load32_acquire,
    load32_relaxed,
    lowest_bit,
    store8,
    store16,
    store32,
    store32_relaxed,
    store32_release,
    store64,
)

WAYS = 8
ALIGN = 64  # bytes of a cache line
OWNERS, VERSION, ORDER, USES, PROBATION, ABSENT_WAYS, GHOSTS, ROWS = 64, 96, 100, 104, 112, 113, 116, 128
GHOST_COUNT = 6
_ORDER_0 = 0x76543210
_NIBBLES = 0x11111111


def set_bytes(width: int) -> int:
    """Of one set with rows of `width` bytes."""
    return -(-(ROWS + WAYS * width) // ALIGN) * ALIGN


@njit(cache=True, nogil=True, inline="always")
def mix(number):  # type: ignore[no-untyped-def]
    """uint64 -> uint64, a bijection that spreads every bit over all (the finaliser of splitmix64)."""
    mixed = np.uint64(number)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@njit(cache=True, nogil=True, inline="always")
def set_number(key, salt, sparse, sets):  # type: ignore[no-untyped-def]
    """0 … sets - 1, not falling with the hash, so that sets can be merged and split where they are.

    Dense ids are multiplied by the golden ratio: any run of N consecutive numbers falls into the sets almost evenly
    (the three-distance theorem), N / sets of them in each or one or two more, where random hashing would leave a
    seventh of a table without a place in a cache of its size. The tables of a release have consecutive runs, by
    `salt`. Sparse ids are mixed: they may have any stride.
    """
    number = np.uint64(key) + np.uint64(salt)
    hashed = mix(number) if sparse else number * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(((hashed >> np.uint64(32)) * np.uint64(sets)) >> np.uint64(32))


@njit(cache=True, nogil=True, inline="always")
def fingerprint(key, owner):  # type: ignore[no-untyped-def]
    """1 … 65535: 0 is a ghost's empty place."""
    return np.int64(mix(np.uint64(key) ^ (np.uint64(owner) << np.uint64(32))) >> np.uint64(48)) | 1


@njit(cache=True, nogil=True, inline="always")
def way_of(memory, at, key, owner):  # type: ignore[no-untyped-def]
    """-1 where it is not there. Without a branch over the ways: which one it is cannot be predicted, and a wrong guess
    would keep the next id's memory from being fetched meanwhile."""
    same = equal8(memory, at, key, at + OWNERS, owner)
    return lowest_bit(same) if same else -1


@njit(cache=True, nogil=True, inline="always")
def version_of(memory, at):  # type: ignore[no-untyped-def]
    """Before anything else of a set is read."""
    return load32_acquire(memory, at + VERSION)


@njit(cache=True, nogil=True, inline="always")
def changed(memory, at, version):  # type: ignore[no-untyped-def]
    """Whether what was read of the set since it had this version may not belong together. After `fence_acquire`."""
    return (load32_relaxed(memory, at + VERSION) != version) | (version & 1 == 1)


@njit(cache=True, nogil=True, inline="always")
def begin_write(memory, at):  # type: ignore[no-untyped-def]
    """One writer at a time."""
    store32_relaxed(memory, at + VERSION, load32_relaxed(memory, at + VERSION) + 1)
    fence_release()


@njit(cache=True, nogil=True, inline="always")
def end_write(memory, at):  # type: ignore[no-untyped-def]
    store32_release(memory, at + VERSION, load32_relaxed(memory, at + VERSION) + 1)


@njit(cache=True, nogil=True, inline="always")
def put_entry(memory, at, way, key, owner, absent):  # type: ignore[no-untyped-def]
    """All of an entry but its row and its place in the order."""
    store64(memory, at + 8 * way, key)
    store32(memory, at + OWNERS + 4 * way, owner)
    put_bit(memory, at + ABSENT_WAYS, way, absent)


@njit(cache=True, nogil=True, inline="always")
def put_bit(memory, at, way, value):  # type: ignore[no-untyped-def]
    store8(memory, at, load8(memory, at) & ~(1 << way) | (np.int64(value) << way))


@njit(cache=True, nogil=True, inline="always")
def order_of(memory, at):  # type: ignore[no-untyped-def]
    """Eight nibbles, the oldest way in the lowest."""
    return load32(memory, at + ORDER) ^ _ORDER_0


@njit(cache=True, nogil=True, inline="always")
def _nibble_of(order, way):  # type: ignore[no-untyped-def]
    """16 to the power of the way's place in the order: the lowest nibble of the difference that is zero."""
    difference = order ^ (way * _NIBBLES)
    zero = (difference - _NIBBLES) & ~difference & (8 * _NIBBLES)
    return (zero & -zero) >> 3


@njit(cache=True, nogil=True, inline="always")
def make_newest(memory, at, way):  # type: ignore[no-untyped-def]
    """One store, and always of a permutation: readers may do it at the same time, and lose a step at worst."""
    order = order_of(memory, at)
    older = _nibble_of(order, way) - 1
    moved = (order & older) | ((order >> 4) & ~older & 0x0FFFFFFF) | (way << 28)
    store32(memory, at + ORDER, moved ^ _ORDER_0)


@njit(cache=True, nogil=True, inline="always")
def make_oldest(memory, at, way):  # type: ignore[no-untyped-def]
    order = order_of(memory, at)
    nibble = _nibble_of(order, way)
    moved = (order & ~(16 * nibble - 1)) | ((order & (nibble - 1)) << 4) | way
    store32(memory, at + ORDER, moved ^ _ORDER_0)


@njit(cache=True, nogil=True, inline="always")
def oldest(memory, at, mask):  # type: ignore[no-untyped-def]
    """The oldest of the ways whose bit is set; the newest of all where none is."""
    order = order_of(memory, at)
    way = 0
    for place in range(WAYS):
        way = (order >> (4 * place)) & 7
        if (mask >> way) & 1:
            break
    return way


@njit(cache=True, nogil=True)
def remember(memory, at, mark):  # type: ignore[no-untyped-def]
    for place in range(GHOST_COUNT - 1, 0, -1):
        store16(memory, at + GHOSTS + 2 * place, load16(memory, at + GHOSTS + 2 * place - 2))
    store16(memory, at + GHOSTS, mark)


@njit(cache=True, nogil=True)
def recall(memory, at, mark):  # type: ignore[no-untyped-def]
    """Whether it is remembered, which it is no more afterwards."""
    for place in range(GHOST_COUNT):
        if load16(memory, at + GHOSTS + 2 * place) == mark:
            store16(memory, at + GHOSTS + 2 * place, 0)
            return True
    return False
