"""Row codecs against numpy's own conversions, page geometry against the allocator's size classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedding_store.codec import (
    CODECS,
    bucket_rows,
    check_name,
    check_table,
    decode,
    encode,
    encode_table,
    page_rows,
    row_bytes,
)
from embedding_store.errors import InvalidRelease
from embedding_store.pages import PageWriter, read_hot, write_hot
from embedding_store.release import Codec, TableInfo
from tests.embedding_store.check_reference import stored

WIDTHS = st.tuples(st.integers(1, 20), st.integers(1, 40))
ANY_ROWS = hnp.arrays(np.float32, WIDTHS, elements=st.floats(-65504, 65504, width=32))
SMALL_ROWS = hnp.arrays(np.float32, WIDTHS, elements=st.floats(-(2.0**-12), 2.0**-12, width=32))  # subnormal halves
NARROW_ROWS = st.builds(  # far from zero, and hardly any range
    lambda base, rows: (np.float32(base) + rows).astype(np.float32), st.floats(-60000, 60000, width=32), SMALL_ROWS
)
CONSTANT_ROWS = st.builds(
    lambda values, dim: np.repeat(values[:, None], dim, axis=1),
    hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-65504, 65504, width=32)),
    st.integers(1, 40),
)


@given(rows=ANY_ROWS)
def test_fp32_gives_back_the_same_bits(rows: np.ndarray) -> None:
    encoded = encode("fp32", rows)
    assert encoded.dtype == np.uint8
    assert encoded.shape == (len(rows), 4 * rows.shape[1])
    np.testing.assert_array_equal(decode("fp32", encoded).view(np.uint32), rows.view(np.uint32))


def test_every_half_is_decoded() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        got = decode("fp16", bits.view(np.uint8).reshape(256, 512))
    np.testing.assert_array_equal(got.ravel(), bits.view(np.float16).astype(np.float32))


def bound(codec: Codec, rows: np.ndarray, got: np.ndarray) -> np.ndarray:
    """What a value may be off by, float64 [n, dim], from the values alone. It holds per row."""
    exact = rows.astype(np.float64)
    if codec == "fp32":
        return np.zeros_like(exact)
    if codec == "fp16":
        return np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25)  # half a unit in the last place; among subnormals
    low, high = exact.min(axis=1, keepdims=True), exact.max(axis=1, keepdims=True)
    scale = (1 + 2.0**-10) / 255 * (high - low + 2.0**-10 * np.abs(low)) + 2.0**-23
    return scale / 2 + 2.0**-24 * np.abs(got)


@pytest.mark.parametrize("codec", CODECS)
@given(rows=st.one_of(ANY_ROWS, SMALL_ROWS, NARROW_ROWS, CONSTANT_ROWS))
def test_no_value_is_off_by_more_than_the_bound(codec: Codec, rows: np.ndarray) -> None:
    encoded = encode_table("item", codec, rows, range(len(rows)))
    assert encoded.shape == (len(rows), row_bytes(codec, rows.shape[1]))
    got = decode(codec, encoded)
    assert got.dtype == np.float32
    off = np.abs(got.astype(np.float64) - rows.astype(np.float64))
    assert (off <= bound(codec, rows, got.astype(np.float64))).all()


@pytest.mark.parametrize("codec", CODECS)
@given(rows=st.one_of(ANY_ROWS, SMALL_ROWS, NARROW_ROWS))
def test_what_was_decoded_encodes_to_the_same_values(codec: Codec, rows: np.ndarray) -> None:
    """Exporting a table that was read back out of a store: fp32 and fp16 bit for bit, int8 within its own bound."""
    once = decode(codec, encode(codec, rows))
    twice = decode(codec, encode(codec, once))
    if codec != "int8":
        np.testing.assert_array_equal(twice.view(np.uint32), once.view(np.uint32))
    assert (np.abs(twice - once.astype(np.float64)) <= bound(codec, once, twice)).all()


@given(rows=CONSTANT_ROWS)
def test_an_int8_row_of_one_value_is_finer_than_fp16(rows: np.ndarray) -> None:
    exact = rows.astype(np.float64)
    off = np.abs(decode("int8", encode("int8", rows)) - exact)
    assert (off <= 2.0**-18 * np.abs(exact) + 2.0**-24).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 2.0**-24, 0.0999755859375])
def test_an_int8_row_of_one_half_is_exact(value: float) -> None:
    rows = np.full((2, 5), value, np.float32)
    np.testing.assert_array_equal(decode("int8", encode("int8", rows)), rows)


def test_int8_rows_are_bytes_then_scale_then_offset() -> None:
    """By hand: 0, 1, …, 255 above -100 need neither rounding."""
    row = np.arange(256, dtype=np.float32) - 100
    encoded = encode("int8", row[None])
    assert encoded[0, :256].tolist() == list(range(256))
    assert encoded[0, 256:].tobytes() == np.array([1, -100], "<f2").tobytes()
    np.testing.assert_array_equal(decode("int8", encoded)[0], row)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_values_that_are_not_finite_are_refused(codec: Codec, value: float, shown: str) -> None:
    rows = np.ones((10, 4), np.float32)
    rows[7, 2] = value
    with pytest.raises(InvalidRelease, match=rf"table 'item': id 1007, column 2 is {shown}; rows must be finite"):
        encode_table("item", codec, rows, range(1000, 1010))
    ids = np.arange(10) + np.iinfo(np.int64).min
    with pytest.raises(InvalidRelease, match=rf"table 'item': id -9223372036854775801, column 2 is {shown}"):
        encode_table("item", codec, rows, ids)


def test_what_a_half_cannot_hold_is_refused() -> None:
    rows = np.full((3, 2), 65519.0, np.float32)  # rounds down to 65504
    assert (decode("fp16", encode_table("item", "fp16", rows, range(3))) == 65504).all()
    rows[2, 1] = 65520.0
    with pytest.raises(
        InvalidRelease, match=r"id 2 has values from 65519 to 65520; fp16 holds values within ±65504: use"
    ):
        encode_table("item", "fp16", rows, range(3))


def test_what_int8_cannot_hold_is_refused() -> None:
    widest = np.array([[-65504, 255 * 65504.0 - 65504], [7e5, 1.6e7]], np.float32)  # both ends of what it can
    got = decode("int8", encode_table("item", "int8", widest, range(2)))
    np.testing.assert_allclose(got, widest, atol=65504 / 2 + 1)
    for row in ([-65536, 0], [-65504, 16703520], [1.7e7, 1.7e7]):
        rows = np.array([[1, 2], row], np.float32)
        with pytest.raises(
            InvalidRelease,
            match=r"table 'item': id 5 has values from .* to .*; int8 holds rows of values from -65504 on that reach "
            r"over 1.67035e\+07 at most: use the row codec fp32",
        ):
            encode_table("item", "int8", rows, range(4, 6))


def test_pages_stay_in_their_size_class() -> None:
    assert page_rows(128) == 62
    for width in range(1, 9000):
        rows, stored = page_rows(width), width + 2
        fits = rows * stored + 6 <= 8192
        assert fits or rows == 1
        assert (rows + 1) * stored + 6 > 8192


def test_buckets_have_some_1400_bytes() -> None:
    assert [bucket_rows(width) for width in (4, 20, 128, 1390, 1391, 9000)] == [100, 46, 10, 1, 1, 1]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a:b", "-a", "a b", "ä", "a" * 129, "a\n"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRelease, match=r"table .*: a name has 1 to 128 letters"):
        check_name("table", name)


def test_geometry_must_fit_the_codec() -> None:
    good = TableInfo(name="t", rows=1, dim=4, codec="fp16", row_bytes=8, page_rows=63, sha256="")
    check_table(good)
    with pytest.raises(InvalidRelease, match="row_bytes is 16; fp16 of dim 4 takes 8"):
        check_table(TableInfo(name="t", rows=1, dim=4, codec="fp16", row_bytes=16, page_rows=63, sha256=""))
    with pytest.raises(InvalidRelease, match="default_row has 3 bytes instead of 8"):
        check_table(
            TableInfo(name="t", rows=1, dim=4, codec="fp16", row_bytes=8, page_rows=63, sha256="", default_row=b"abc")
        )
    with pytest.raises(InvalidRelease, match="row codec 'int4' is unknown; accepted: fp32, fp16, int8"):
        row_bytes("int4", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", CODECS)
def test_a_pages_file_is_the_rows_one_after_another(tmp_path: Path, codec: Codec) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((1000, 16)).astype(np.float32)
    hot = np.array([5, 999, 0])
    default = rng.standard_normal(16).astype(np.float32)
    with PageWriter(tmp_path, "item", codec, 16) as writer:
        for part in np.array_split(rows, 7):
            writer.append(part)
        table = writer.finish(hot_ids=hot, default_row=default)
    content = (tmp_path / "item.pages").read_bytes()
    assert content == b"".join(stored(table, i, row.tobytes()) for i, row in enumerate(encode(codec, rows)))
    assert table == TableInfo(
        name="item", rows=1000, dim=16, codec=codec, row_bytes=row_bytes(codec, 16),
        page_rows=page_rows(row_bytes(codec, 16)), sha256=hashlib.sha256(content).hexdigest(), hot_ids=3,
        default_row=encode(codec, default[None]).tobytes(),
    )  # fmt: skip
    np.testing.assert_array_equal(read_hot(tmp_path, table), hot)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["item.hot", "item.pages"]


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    with PageWriter(tmp_path, "item", "fp32", 2) as writer:
        writer.append(np.ones((3, 2), np.float32))
        with pytest.raises(InvalidRelease, match="id 3, column 0 is nan"):
            writer.append(np.full((1, 2), np.nan, np.float32))
        with pytest.raises(InvalidRelease, match=r"rows are \[1, 3\]; expected \[n, 2\]"):
            writer.append(np.ones((1, 3), np.float32))
    assert list(tmp_path.iterdir()) == []
    with PageWriter(tmp_path, "item", "fp32", 2) as writer, pytest.raises(InvalidRelease, match="'item' has no rows"):
        writer.finish()


def test_hot_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRelease, match="table 't': hot id 10 is outside 0 … 9"):
        write_hot(tmp_path, "t", np.array([1, 10]), rows=10)
    with pytest.raises(InvalidRelease, match="names an id twice"):
        write_hot(tmp_path, "t", np.array([1, 1]), rows=10)
    write_hot(tmp_path, "t", np.array([1, 2]), rows=10)
    table = TableInfo(name="t", rows=10, dim=1, codec="fp32", row_bytes=4, page_rows=9, sha256="", hot_ids=3)
    with pytest.raises(InvalidRelease, match="has 16 bytes; 3 ids take 24"):
        read_hot(tmp_path, table)
