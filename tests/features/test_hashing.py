"""XXH64 against python-xxhash, and against values that Spark itself publishes."""

from __future__ import annotations

import random
import struct

import numba
import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from torchrank.features.hashing import SEED, bucket, hash_bytes, hash_int64


@numba.njit  # not cached: numba would not notice a change of hashing.py
def hash_slices(data: NDArray[np.uint8], offsets: NDArray[np.int64], seed: np.uint64, out: NDArray[np.uint64]) -> None:
    for i in range(len(out)):
        out[i] = hash_bytes(data, offsets[i], offsets[i + 1], seed)


def hash_values(values: list[bytes], seed: int) -> list[int]:
    offsets = np.cumsum([0] + [len(value) for value in values])
    out = np.empty(len(values), dtype=np.uint64)
    hash_slices(np.frombuffer(b"".join(values), dtype=np.uint8), offsets, np.uint64(seed), out)
    return [int(h) for h in out]


def test_every_length_and_alignment_equals_python_xxhash() -> None:
    rng = random.Random(1234)
    values = [rng.randbytes(length) for length in [*range(140), 1000, 1 << 16]]
    rng.shuffle(values)
    for seed in (0, 42, 2**63, 2**64 - 1):
        assert hash_values(values, seed) == [xxhash.xxh64_intdigest(value, seed) for value in values]


def test_int64_hashes_as_its_eight_bytes() -> None:
    rng = random.Random(5)
    values = [0, 1, -1, 2**63 - 1, -(2**63), *(rng.randrange(-(2**63), 2**63) for _ in range(200))]
    for value in values:
        seed = rng.randrange(2**64)
        expected = xxhash.xxh64_intdigest(struct.pack("<q", value), seed)
        assert int(hash_int64(np.int64(value), np.uint64(seed))) == expected, value


def test_chained_hash_is_the_one_in_sparks_documentation() -> None:
    """`SELECT xxhash64('Spark', array(123), 2)` is 5602566077635097486; Spark hashes those two ints as four bytes."""
    h = hash_values([b"Spark"], int(SEED))[0]
    h = hash_values([struct.pack("<i", 123)], h)[0]
    assert hash_values([struct.pack("<i", 2)], h)[0] == 5602566077635097486


@pytest.mark.parametrize(
    ("value", "golden"),
    [  # signed, as Spark's bigint; by python-xxhash; a trained table depends on them
        (b"", -7444071767201028348),
        (b"a", -8582455328737087284),
        (b"item_42", 8627400147322711903),
        ("日本語".encode(), -619341062884681239),
        (b"a string that is longer than thirty-two bytes", 183656323002158976),
    ],
)
def test_golden_values(value: bytes, golden: int) -> None:
    assert np.uint64(hash_values([value], 42)[0]).astype(np.int64) == golden


def test_bucket_is_the_never_negative_remainder_of_the_signed_hash() -> None:
    rng = random.Random(6)
    for _ in range(500):
        h, buckets = rng.randrange(2**64), rng.choice([1, 2, 7, 1000, 2**31, 2**40 + 1])
        signed = h - 2**64 if h >= 2**63 else h
        assert bucket(np.uint64(h), buckets) == signed % buckets
