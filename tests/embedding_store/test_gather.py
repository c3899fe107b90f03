"""The kernels over encoded rows, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba import njit

from embedding_store.codec import CODECS, decode, encode
from embedding_store.gather import pad_into, pool_into
from embedding_store.half import float_to_half
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
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_pooling_into_halves_rounds_the_float32_sum_once(codec: Codec, weighted: bool, mean: bool) -> None:
    rng = np.random.default_rng(11)
    rows = encode(codec, rng.standard_normal((17, 24)).astype(np.float32))
    index, offsets = random_bags(rng, 200, 17)
    weights = rng.standard_normal(len(index)).astype(np.float32) if weighted else None
    wide, half = np.zeros((200, 30), np.float32), np.full((200, 30), 7, np.float16)
    for out in (wide, half):
        pool_into(codec, rows, index, offsets, out, 5, 24, mean, weights)
    np.testing.assert_array_equal(half[:, 5:29].view(np.uint16), wide[:, 5:29].astype(np.float16).view(np.uint16))
    assert (half[:, :5] == 7).all()
    assert (half[:, 29:] == 7).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("seed", SEEDS)
def test_padding(codec: Codec, dtype: type[np.floating], seed: int) -> None:
    """Bit for bit what the codec decodes."""
    rng = np.random.default_rng(seed)
    dim, bags, distinct, steps = int(rng.integers(1, 40)), int(rng.integers(0, 30)), 17, int(rng.integers(1, 7))
    rows = encode(codec, rng.standard_normal((distinct, dim)).astype(np.float32))
    index, offsets = random_bags(rng, bags, distinct)
    out = np.full((bags, steps, dim), np.nan, dtype)
    pad_into(codec, rows, index, offsets, out)

    values = decode(codec, rows).astype(dtype)
    expected = np.zeros((bags, steps, dim), dtype)
    for bag in range(bags):
        for step, place in enumerate(range(offsets[bag], min(offsets[bag] + steps, offsets[bag + 1]))):
            expected[bag, step] = values[index[place]]
    np.testing.assert_array_equal(out, expected)


@given(rows=hnp.arrays(np.float32, (7, 9), elements=st.floats(-65504, 65504, width=32)))
@settings(deadline=None)  # the first example compiles
def test_int8_rows_decode_alike_in_python_and_in_kernels(rows: np.ndarray) -> None:
    encoded = encode("int8", rows)
    out = np.empty((7, 9), np.float32)
    pool_into("int8", encoded, np.arange(7), np.arange(8), out, 0, 9, mean=False)
    np.testing.assert_array_equal(out.view(np.uint32), decode("int8", encoded).view(np.uint32))


@njit
def to_halves(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = float_to_half(values[i])


def check_halves(values: np.ndarray) -> None:
    out = np.empty(len(values), np.uint16)
    to_halves(values, out)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, values.astype(np.float16).view(np.uint16))


def test_a_float_becomes_the_nearest_half() -> None:
    """Against numpy: every half, what lies on and beside the middle of every two of them, and any float."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2  # exact in float32: ties, to even
    edges = np.concatenate(
        (halves, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(9e9)))
    )
    limits = np.array([65504, 65519.996, 65520, 65536, 3.4e38, np.inf, 1e-45, 2.0**-25, 2.9802326e-08], np.float32)
    bits = np.random.default_rng(5).integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    for values in (edges, limits, bits[~np.isnan(bits)]):
        check_halves(values)
        check_halves(-values)
    out = np.empty(2, np.uint16)
    to_halves(np.array([np.nan, -np.nan], np.float32), out)
    assert np.isnan(out.view(np.float16)).all()


def test_every_half_is_decoded_in_kernels() -> None:
    """Subnormals, both zeros, infinities and NaN: bit for bit what numpy makes of them."""
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    out = np.empty((256, 1, 256), np.float32)
    pad_into("fp16", bits.view(np.uint8), np.arange(256), np.arange(257), out)
    np.testing.assert_array_equal(out[:, 0].view(np.uint32), bits.view(np.float16).astype(np.float32).view(np.uint32))


def test_arguments_that_do_not_fit() -> None:
    rows, index, offsets = np.zeros((2, 8), np.uint8), np.array([0, 1]), np.array([0, 2])
    with pytest.raises(ValueError, match="fp16 rows of dim 3 have 6 bytes, not 8"):
        pool_into("fp16", rows, index, offsets, np.zeros((1, 3), np.float32), 0, 3, mean=False)
    with pytest.raises(ValueError, match=r"1 rows, columns 1 to 5 do not fit into out \(1, 4\)"):
        pool_into("fp16", rows, index, offsets, np.zeros((1, 4), np.float32), 1, 4, mean=False)
    with pytest.raises(ValueError, match="offsets end at 3, but 2 values were looked up"):
        pad_into("fp16", rows, index, np.array([0, 3]), np.zeros((1, 2, 4), np.float32))
    with pytest.raises(ValueError, match="out is float64; accepted: float32, float16"):
        pad_into("fp16", rows, index, offsets, np.zeros((1, 2, 4)))
