"""XXH64 with seed 42, bit for bit Spark's `xxhash64`, so that SQL and Python name the same bucket.

A string is hashed as its UTF-8 bytes, an int64 as its eight bytes, little-endian; several values are chained, the
hash of one being the seed of the next. Algorithm: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.

Numba turns `int64 op uint64` into float64, hence the explicit uint64 everywhere; unsigned indices also spare the
check for negative ones, which lets LLVM read eight bytes by one load.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torchrank.features.kernel import kernel

SEED = np.uint64(42)

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_ONE, _FOUR, _EIGHT, _STRIPE = np.uint64(1), np.uint64(4), np.uint64(8), np.uint64(32)


@kernel
def _rotate(x: np.uint64, bits: int) -> np.uint64:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@kernel
def _round(accumulator: np.uint64, word: np.uint64) -> np.uint64:
    return _rotate(accumulator + word * _P2, 31) * _P1


@kernel
def _merge(h: np.uint64, accumulator: np.uint64) -> np.uint64:
    return (h ^ _round(np.uint64(0), accumulator)) * _P1 + _P4


@kernel
def _avalanche(h: np.uint64) -> np.uint64:
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return h ^ (h >> np.uint64(32))


@kernel
def _word32(data: NDArray[np.uint8], at: np.uint64) -> np.uint64:
    word = np.uint64(0)
    for byte in range(4):
        word |= np.uint64(data[at + np.uint64(byte)]) << np.uint64(8 * byte)
    return word


@kernel
def _word64(data: NDArray[np.uint8], at: np.uint64) -> np.uint64:
    word = np.uint64(0)
    for byte in range(8):
        word |= np.uint64(data[at + np.uint64(byte)]) << np.uint64(8 * byte)
    return word


@kernel
def hash_bytes(data: NDArray[np.uint8], start: int, stop: int, seed: np.uint64) -> np.uint64:
    """XXH64 of data[start:stop]."""
    at, end = np.uint64(start), np.uint64(stop)
    length = end - at
    if length >= _STRIPE:
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while at + _STRIPE <= end:
            a = _round(a, _word64(data, at))
            b = _round(b, _word64(data, at + np.uint64(8)))
            c = _round(c, _word64(data, at + np.uint64(16)))
            d = _round(d, _word64(data, at + np.uint64(24)))
            at += _STRIPE
        h = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        h = _merge(_merge(_merge(_merge(h, a), b), c), d)
    else:
        h = seed + _P5
    h += length
    while at + _EIGHT <= end:
        h = _rotate(h ^ _round(np.uint64(0), _word64(data, at)), 27) * _P1 + _P4
        at += _EIGHT
    if at + _FOUR <= end:
        h = _rotate(h ^ (_word32(data, at) * _P1), 23) * _P2 + _P3
        at += _FOUR
    while at < end:
        h = _rotate(h ^ (np.uint64(data[at]) * _P5), 11) * _P1
        at += _ONE
    return _avalanche(h)


@kernel
def hash_int64(value: int, seed: np.uint64) -> np.uint64:
    """XXH64 of the eight bytes of `value`."""
    h = seed + _P5 + _EIGHT
    h = _rotate(h ^ _round(np.uint64(0), np.uint64(value)), 27) * _P1 + _P4
    return _avalanche(h)


@kernel
def bucket(h: np.uint64, buckets: int) -> int:
    """Spark's pmod(hash, buckets): the hash is signed there, and the remainder never negative."""
    return np.int64(h) % buckets  # type: ignore[return-value]
