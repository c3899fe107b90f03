"""Buckets: how a Redis keeps the rows of a table of raw 64-bit ids.

Id i is in bucket mix(i) · buckets >> 64. A bucket, as a string: check uint16 | count uint32 | ids int64 [count] | rows
uint8 [count, stored_bytes], little-endian, in the order of the file. An empty bucket has a count of 0: one that is not
there is lost. Each row has its own check; that of the bucket is of count and ids, and says that no other id is in it.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.release import CHECK_BYTES
from embedding_store.row_checks import check_at, quad_at, row_check, word_at
from embedding_store.sparse import NOT_THERE, mix

COUNT_BYTES = 4
HEAD_BYTES = CHECK_BYTES + COUNT_BYTES
ID_BYTES = 8
DAMAGED = -2

_U32 = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_BYTE, _LOW_BYTE = np.uint64(8), np.uint64(0xFF)


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
    seed: np.uint64, first_bucket: int, ids: NDArray[np.int64], rows: NDArray[np.uint8], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """ids int64 [n] and rows uint8 [n, stored_bytes] of the b buckets from `first_bucket` on whose bounds these are,
    int64 [b + 1]. seed: see `row_checks.table_seed`.

    Returns their strings one after another, uint8, and where each begins and the last ends, int64 [b + 1].
    """
    starts = HEAD_BYTES * np.arange(len(bounds)) + (ID_BYTES + rows.shape[1]) * bounds
    encoded = np.empty(starts[-1], np.uint8)
    _encode(seed, first_bucket, ids.view(np.uint8).reshape(-1, ID_BYTES), rows, bounds, starts, encoded)
    return encoded, starts


@njit(cache=True, nogil=True)
def _encode(seed, first_bucket, ids, rows, bounds, starts, encoded):  # type: ignore[no-untyped-def]
    width, address = rows.shape[1], np.int64(encoded.ctypes.data)
    for k in range(len(bounds) - 1):
        count = bounds[k + 1] - bounds[k]
        for byte in range(COUNT_BYTES):
            encoded[starts[k] + CHECK_BYTES + byte] = (count >> (8 * byte)) & 0xFF
        id_at = starts[k] + HEAD_BYTES
        row_at = id_at + ID_BYTES * count
        for i in range(bounds[k], bounds[k + 1]):
            encoded[id_at : id_at + ID_BYTES] = ids[i]
            encoded[row_at : row_at + width] = rows[i]
            id_at += ID_BYTES
            row_at += width
        check = _ids_check(address + starts[k], count, seed, first_bucket + k)
        encoded[starts[k]], encoded[starts[k] + 1] = check & _LOW_BYTE, check >> _BYTE


@njit(cache=True, nogil=True)
def _ids_check(address, count, seed, bucket):  # type: ignore[no-untyped-def]
    """Of count and ids of the bucket at this address; not that of a row with the same bytes."""
    return row_check(~seed, bucket, address + CHECK_BYTES, COUNT_BYTES + ID_BYTES * count)


@njit(cache=True, nogil=True, inline="always")
def find_in_bucket(
    address: np.int64, length: int, key: np.int64, stored_bytes: int, seed: np.uint64, bucket: int
) -> np.int64:
    """Where the row of id `key` begins in the bucket of this number, `length` bytes that lie at this address. Whoever
    takes the row looks at its check.

    NOT_THERE where the table has no such id, DAMAGED where this is no whole bucket (also for length -1: no string), or
    has not the ids that it was written with.
    """
    count = np.int64(quad_at(address + CHECK_BYTES)) if length >= HEAD_BYTES else np.int64(-1)
    if count < 0 or length != HEAD_BYTES + count * (ID_BYTES + stored_bytes):
        return np.int64(DAMAGED)
    ids, wanted = address + HEAD_BYTES, np.uint64(key)
    for i in range(count):  # some ten ids that lie together: a search would not be faster
        if word_at(ids + ID_BYTES * i) == wanted:
            return np.int64(HEAD_BYTES + ID_BYTES * count + stored_bytes * i)
    return np.int64(NOT_THERE if check_at(address) == _ids_check(address, count, seed, bucket) else DAMAGED)
