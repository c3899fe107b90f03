"""The kernels over encoded rows, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_store.codec import CODECS, decode, encode
from embedding_store.gather import pad_into, pool_into, take_rows
from embedding_store.release import Codec

SEEDS = range(6)


def random_bags(rng: np.random.Generator, bags: int, distinct: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = rng.integers(0, 6, bags)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return rng.integers(0, distinct, offsets[-1]), offsets


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_pooling(codec: Codec, weighted: bool, mean: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dim, bags, distinct = int(rng.integers(1, 40)), int(rng.integers(0, 30)), 17
    rows = encode(codec, rng.standard_normal((distinct, dim)).astype(np.float32))
    index, offsets = random_bags(rng, bags, distinct)
    weights = rng.standard_normal(len(index)).astype(np.float32) if weighted else None
    out = np.full((bags, dim + 5), 7.0, np.float32)
    pool_into(codec, rows, index, offsets, out, 3, dim, mean, weights)

    values = decode(codec, rows).astype(np.float64)
    expected = np.full((bags, dim + 5), 7.0)
    for bag in range(bags):
        places = range(offsets[bag], offsets[bag + 1])
        total = np.zeros(dim)
        for place in places:
            total += (1.0 if weights is None else float(weights[place])) * values[index[place]]
        expected[bag, 3 : 3 + dim] = total / len(places) if mean and len(places) else total
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", SEEDS)
def test_padding(codec: Codec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dim, bags, distinct, steps = int(rng.integers(1, 40)), int(rng.integers(0, 30)), 17, int(rng.integers(1, 7))
    rows = encode(codec, rng.standard_normal((distinct, dim)).astype(np.float32))
    index, offsets = random_bags(rng, bags, distinct)
    out = np.full((bags, steps, dim), np.nan, np.float32)
    pad_into(codec, rows, index, offsets, out)

    values = decode(codec, rows)
    expected = np.zeros((bags, steps, dim), np.float32)
    for bag in range(bags):
        for step, place in enumerate(range(offsets[bag], min(offsets[bag] + steps, offsets[bag + 1]))):
            expected[bag, step] = values[index[place]]
    np.testing.assert_array_equal(out, expected)


def test_every_half_is_decoded_in_kernels() -> None:
    """Subnormals, both zeros, infinities and NaN: bit for bit what numpy makes of them."""
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    out = np.empty((256, 1, 256), np.float32)
    pad_into("fp16", bits.view(np.uint8), np.arange(256), np.arange(257), out)
    np.testing.assert_array_equal(out[:, 0].view(np.uint32), bits.view(np.float16).astype(np.float32).view(np.uint32))


def test_take_rows_leaves_unknown_ids_alone() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 256, (50, 9)).astype(np.uint8)
    ids = np.array([0, 49, 50, -1, -(2**63), 2**63 - 1, 7])
    rows, found = np.full((7, 9), 255, np.uint8), np.empty(7, np.bool_)
    take_rows(table, ids, rows, found)
    assert found.tolist() == [True, True, False, False, False, False, True]
    np.testing.assert_array_equal(rows, np.where(found[:, None], table[np.where(found, ids, 0)], 255))


def test_arguments_that_do_not_fit() -> None:
    rows, index, offsets = np.zeros((2, 8), np.uint8), np.array([0, 1]), np.array([0, 2])
    with pytest.raises(ValueError, match="fp16 rows of 8 bytes have dim 4, not 3"):
        pool_into("fp16", rows, index, offsets, np.zeros((1, 3), np.float32), 0, 3, mean=False)
    with pytest.raises(ValueError, match=r"1 rows, columns 1 to 5 do not fit into out \(1, 4\)"):
        pool_into("fp16", rows, index, offsets, np.zeros((1, 4), np.float32), 1, 4, mean=False)
    with pytest.raises(ValueError, match="offsets end at 3, but 2 values were looked up"):
        pad_into("fp16", rows, index, np.array([0, 3]), np.zeros((1, 2, 4), np.float32))
