"""Buckets: how a Redis keeps the rows of a table of raw 64-bit ids.

Id i is in bucket mix(i) · buckets >> 64. A bucket, as a string: count uint32 | ids int64 [count] | rows uint8 [count,
row_bytes], little-endian, in the order of the file. An empty bucket is a count of 0: one that is not there is lost.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.sparse import NOT_THERE, mix

COUNT_BYTES = 4
ID_BYTES = 8
DAMAGED = -2

_U32 = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@njit(cache=True, nogil=True, inline="always")
def bucket_of(key: np.int64, buckets: int) -> np.int64:
    """mix(key) · buckets >> 64, for less than 2^32 buckets."""
    mixed, count = mix(key), np.uint64(buckets)
    return np.int64(((mixed >> _U32) * count + (((mixed & _LOW) * count) >> _U32)) >> _U32)


@njit(cache=True, nogil=True)
def buckets_of(ids: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
    found = np.empty(len(ids), np.int64)
    for i in range(len(ids)):
        found[i] = bucket_of(ids[i], buckets)
    return found


@njit(cache=True, nogil=True)
def bucket_bounds(ids: NDArray[np.int64], first_bucket: int, count: int, buckets: int) -> NDArray[np.int64]:
    """ids, in their order, from the first of `first_bucket` on -> int64 [count + 1]: where each bucket begins in them,
    and where the last ends. The last is NOT_THERE where they are not in their order."""
    bounds = np.empty(count + 1, np.int64)
    bounds[0] = i = 0
    for k in range(count):
        while i < len(ids) and bucket_of(ids[i], buckets) == first_bucket + k:
            if i and mix(ids[i - 1]) >= mix(ids[i]):
                bounds[count] = NOT_THERE
                return bounds
            i += 1
        bounds[k + 1] = i
    if i < len(ids) and bucket_of(ids[i], buckets) < first_bucket + count:
        bounds[count] = NOT_THERE
    return bounds


def encode_buckets(
    ids: NDArray[np.int64], rows: NDArray[np.uint8], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """ids int64 [n] and rows uint8 [n, row_bytes] of the b buckets whose bounds, int64 [b + 1], these are.

    Returns their strings one after another, uint8, and where each begins and the last ends, int64 [b + 1].
    """
    starts = COUNT_BYTES * np.arange(len(bounds)) + (ID_BYTES + rows.shape[1]) * bounds
    encoded = np.empty(starts[-1], np.uint8)
    _encode(ids.view(np.uint8).reshape(-1, ID_BYTES), rows, bounds, starts, encoded)
    return encoded, starts


@njit(cache=True, nogil=True)
def _encode(ids, rows, bounds, starts, encoded):  # type: ignore[no-untyped-def]
    width = rows.shape[1]
    for k in range(len(bounds) - 1):
        count = bounds[k + 1] - bounds[k]
        for byte in range(COUNT_BYTES):
            encoded[starts[k] + byte] = (count >> (8 * byte)) & 0xFF
        id_at = starts[k] + COUNT_BYTES
        row_at = id_at + ID_BYTES * count
        for i in range(bounds[k], bounds[k + 1]):
            encoded[id_at : id_at + ID_BYTES] = ids[i]
            encoded[row_at : row_at + width] = rows[i]
            id_at += ID_BYTES
            row_at += width


@njit(cache=True, nogil=True, inline="always")
def _unsigned(encoded, start, size):  # type: ignore[no-untyped-def]
    """Little-endian; the compiler makes one load of it."""
    value = np.uint64(0)
    for byte in range(size):
        value |= np.uint64(encoded[start + byte]) << np.uint64(8 * byte)
    return value


@njit(cache=True, nogil=True)
def bucket_count(encoded: NDArray[np.uint8], start: int, length: int, row_bytes: int) -> int:
    """Rows of the bucket encoded[start : start + length], or DAMAGED where it is not as long as they are."""
    if length < COUNT_BYTES:
        return DAMAGED
    count = int(np.int64(_unsigned(encoded, start, COUNT_BYTES)))
    return count if length == COUNT_BYTES + count * (ID_BYTES + row_bytes) else DAMAGED


@njit(cache=True, nogil=True)
def find_in_bucket(encoded: NDArray[np.uint8], start: int, length: int, key: np.int64, row_bytes: int) -> int:
    """Where the row of id `key` begins in `encoded`, of which encoded[start : start + length] is its bucket.

    NOT_THERE where the table has no such id, DAMAGED where this is no whole bucket (also for length -1: no string).
    """
    count = bucket_count(encoded, start, length, row_bytes)
    if count < 0:
        return DAMAGED
    wanted = np.uint64(key)
    for i in range(count):  # some ten ids that lie together: a search would not be faster
        if _unsigned(encoded, start + COUNT_BYTES + ID_BYTES * i, ID_BYTES) == wanted:
            return start + COUNT_BYTES + ID_BYTES * count + row_bytes * i
    return NOT_THERE
