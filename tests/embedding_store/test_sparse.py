"""Tables of raw 64-bit ids: their order, their files, their buckets, against dictionaries and Python's own integers."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numba import njit

from embedding_store.buckets import (
    DAMAGED,
    bucket_bounds,
    buckets_of,
    encode_buckets,
    find_in_bucket,
)
from embedding_store.codec import CODECS, bucket_rows, encode, row_bytes
from embedding_store.errors import InvalidRelease
from embedding_store.pages import read_hot
from embedding_store.release import Codec, TableInfo
from embedding_store.row_checks import table_seed, with_checks
from embedding_store.sparse import NOT_THERE, find_rows, mixed_ids
from embedding_store.sparse_pages import SparsePageWriter, bucket_chunks, map_ids
from tests.embedding_store.check_reference import bucket, stored

EXTREMES = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), -(2**63) + 1]
SEEDS = range(4)
BYTES = TableInfo("bytes", 4, 3, "int8", 3, 4, "", ids="sparse")


def fmix64(key: int) -> int:
    mixed = key % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ mixed >> 33) * factor % 2**64
    return mixed ^ mixed >> 33


def unmix(mixed: int) -> int:
    """The id that has this mix."""
    for factor in (0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD):
        mixed = (mixed ^ mixed >> 33) * pow(factor, -1, 2**64) % 2**64
    mixed ^= mixed >> 33
    return mixed - 2**64 if mixed >= 2**63 else mixed


def random_ids(rng: np.random.Generator, n: int) -> np.ndarray:
    """int64 [≥ n], distinct, in random order: anywhere, small ones in a row, and the extremes."""
    ids = np.concatenate((rng.integers(-(2**63), 2**63 - 1, n), np.arange(n // 2), np.array(EXTREMES)))
    return rng.permutation(np.unique(ids))


def in_order(ids: np.ndarray) -> np.ndarray:
    return np.array(sorted(ids.tolist(), key=fmix64), np.int64)


def write_table(
    folder: Path, rng: np.random.Generator, n: int, codec: Codec = "fp32", dim: int = 4
) -> tuple[TableInfo, np.ndarray, np.ndarray]:
    """The table, its ids in the order they were given, and their encoded rows."""
    ids = random_ids(rng, n)
    rows = rng.standard_normal((len(ids), dim)).astype(np.float32)
    with SparsePageWriter(folder, "item", codec, dim) as writer:
        for start in range(0, len(ids), 97):
            writer.append(ids[start : start + 97], rows[start : start + 97])
        table = writer.finish(hot_ids=ids[:3], default_row=rows[0])
    return table, ids, encode(codec, rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_ids_mix_and_fall_into_buckets_as_integers_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, 300)
    mixed = [fmix64(key) for key in ids.tolist()]
    assert mixed_ids(ids).tolist() == mixed
    assert [unmix(value) for value in mixed] == ids.tolist()
    for buckets in (1, 2, 7, 4096, int(rng.integers(1, 2**32)), 2**32 - 1):
        assert buckets_of(ids, buckets).tolist() == [value * buckets >> 64 for value in mixed]


@pytest.mark.parametrize("n", [0, 1, 2, 50, 3000])
def test_every_id_is_found_where_it_lies_and_no_other(n: int) -> None:
    rng = np.random.default_rng(n)
    ids = in_order(random_ids(rng, n)[:n])
    np.testing.assert_array_equal(find_rows(ids, ids), np.arange(n))
    known = set(ids.tolist())
    others = np.array([key for key in random_ids(rng, 500).tolist() if key not in known], np.int64)
    places = np.searchsorted(mixed_ids(ids), mixed_ids(others))
    np.testing.assert_array_equal(find_rows(ids, others), NOT_THERE - places)


def test_ids_that_were_chosen_to_mix_alike_are_found() -> None:
    """Guessing from the mix leads nowhere here: two crowds, and a few ids between them."""
    crowds = [*range(5000), *range(2**63, 2**63 + 40), *range(2**64 - 5000, 2**64)]
    ids = np.array([unmix(mixed) for mixed in crowds], np.int64)
    np.testing.assert_array_equal(find_rows(ids, ids), np.arange(len(ids)))
    others = np.array([unmix(mixed) for mixed in (5000, 2**62, 2**63 + 40, 2**64 - 5001)], np.int64)
    np.testing.assert_array_equal(find_rows(ids, others), NOT_THERE - np.array([5000, 5000, 5040, 5040]))


@pytest.mark.parametrize("codec", CODECS)
def test_files_of_a_table(tmp_path: Path, codec: Codec) -> None:
    table, ids, encoded = write_table(tmp_path, np.random.default_rng(1), 1000, codec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["item.hot", "item.ids", "item.pages"]
    ordered = in_order(ids)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "item.ids", "<i8"), ordered)
    np.testing.assert_array_equal(map_ids(tmp_path, table), ordered)
    row_of = dict(zip(ids.tolist(), encoded, strict=True))
    pages = (tmp_path / "item.pages").read_bytes()
    assert pages == b"".join(stored(table, key, row_of[key].tobytes()) for key in ordered.tolist())
    width = row_bytes(codec, 4)
    assert table == TableInfo(
        name="item", rows=len(ids), dim=4, codec=codec, row_bytes=width, page_rows=bucket_rows(width),
        sha256=hashlib.sha256(pages).hexdigest(), hot_ids=3, default_row=encoded[0].tobytes(), ids="sparse",
        ids_sha256=hashlib.sha256(ordered.tobytes()).hexdigest(),
    )  # fmt: skip
    np.testing.assert_array_equal(read_hot(tmp_path, table), ids[:3])


def test_what_cannot_be_a_table_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    rows = np.ones((3, 2), np.float32)
    with SparsePageWriter(tmp_path, "item", "fp16", 2) as writer:
        writer.append(np.array([5, -(2**63), 7]), rows)
        with pytest.raises(
            InvalidRelease, match=r"ids are int32 \[3\] and rows \[3, 2\]; expected int64 \[n\] and \[n, 2"
        ):
            writer.append(np.arange(3, dtype=np.int32), rows)
        with pytest.raises(InvalidRelease, match=r"ids are int64 \[2\] and rows \[3, 2\]"):
            writer.append(np.arange(2), rows)
        with pytest.raises(InvalidRelease, match="table 'item': id -9, column 1 is inf; rows must be finite"):
            writer.append(np.array([-9]), np.array([[1, np.inf]], np.float32))
        writer.append(np.array([8, -(2**63)]), rows[:2])
        with pytest.raises(InvalidRelease, match="table 'item': id -9223372036854775808 is given twice"):
            writer.finish()
    with SparsePageWriter(tmp_path, "item", "fp16", 2) as writer, pytest.raises(InvalidRelease, match="has no rows"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("buckets_at_once", [1, 7, 10**6])
def test_chunks_of_buckets_cover_the_table_once(tmp_path: Path, buckets_at_once: int) -> None:
    table, ids, encoded = write_table(tmp_path, np.random.default_rng(2), 2000, dim=32)
    row_of = dict(zip(ids.tolist(), encoded, strict=True))
    seen: dict[int, int] = {}  # id -> bucket
    rows = buckets = 0
    for chunk in bucket_chunks(tmp_path, table, buckets_at_once):
        assert (chunk.first_page, chunk.first_row) == (buckets, rows)
        for k in range(chunk.pages):
            for i in range(chunk.bounds[k], chunk.bounds[k + 1]):
                seen[int(chunk.ids[i])] = chunk.first_page + k
                assert chunk.rows[i].tobytes() == stored(table, int(chunk.ids[i]), row_of[int(chunk.ids[i])].tobytes())
        buckets += chunk.pages
        rows += len(chunk.ids)
    assert (buckets, rows) == (table.pages, table.rows)
    assert seen == {key: fmix64(key) * table.pages >> 64 for key in ids.tolist()}


def test_damaged_files_are_told(tmp_path: Path) -> None:
    table, _, _ = write_table(tmp_path, np.random.default_rng(3), 500)
    path = tmp_path / "item.ids"
    whole = path.read_bytes()
    for first, second in ((3, 4), (0, table.rows - 1)):  # neighbours; the ends
        ids = np.frombuffer(whole, "<i8").copy()
        ids[[first, second]] = ids[[second, first]]
        path.write_bytes(ids.tobytes())
        for at_once in (1, 10, 10**6):
            with pytest.raises(InvalidRelease, match=r"item.ids has ids out of their order: damaged"):
                list(bucket_chunks(tmp_path, table, at_once))
    path.write_bytes(whole[:-8])
    with pytest.raises(
        InvalidRelease, match=rf"item.ids has {len(whole) - 8} bytes; {table.rows} ids take {len(whole)}"
    ):
        list(bucket_chunks(tmp_path, table, 10))
    path.write_bytes(whole)
    (tmp_path / "item.pages").unlink()
    with pytest.raises(InvalidRelease, match=r"cannot read .*item.pages: No such file"):
        list(bucket_chunks(tmp_path, table, 10))


def test_a_bucket_is_its_check_its_count_its_ids_and_its_rows() -> None:
    ids = in_order(np.array([7, -1, 30, 2**63 - 1]))
    rows = np.arange(12, dtype=np.uint8).reshape(4, 3)
    bounds = np.array([0, 3, 3, 4])
    encoded, starts = encode_buckets(table_seed(BYTES), 17, ids, with_checks(table_seed(BYTES), ids, rows), bounds)
    row_of = {key: row.tobytes() for key, row in zip(ids.tolist(), rows, strict=True)}
    first = dict(list(row_of.items())[:3])
    last = dict(list(row_of.items())[3:])
    expected = [bucket(BYTES, 17 + k, rows) for k, rows in enumerate((first, {}, last))]
    assert [encoded[a:b].tobytes() for a, b in pairwise(starts)] == expected
    assert starts[-1] == len(encoded)


@njit
def address_of(content):  # type: ignore[no-untyped-def]
    return np.int64(content.ctypes.data)


@njit
def find_at(address, length, key, width, seed, number):  # type: ignore[no-untyped-def]
    return find_in_bucket(address, length, key, width, seed, number)


def find(
    bucket: np.ndarray, key: int, length: int | None = None, *, width: int = 5, seed: int = 12, number: int = 8
) -> int:
    whole = len(bucket) if length is None else length
    return int(find_at(address_of(bucket), whole, np.int64(key), width, np.uint64(seed), number))


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_found_in_fetched_buckets(seed: int) -> None:
    """Several ids to a bucket, absent ids among them, buckets anywhere in the buffer, some of them lost or cut."""
    rng = np.random.default_rng(seed)
    ids, width, buckets = in_order(random_ids(rng, 400)), int(rng.integers(1, 40)), 60
    rows = rng.integers(0, 256, (len(ids), width), np.uint8)
    row_of = dict(zip(ids.tolist(), rows, strict=True))
    table = np.uint64(rng.integers(2**63))
    encoded, starts = encode_buckets(table, 0, ids, rows, bucket_bounds(ids, 0, buckets, buckets))
    lengths = np.diff(starts)
    lost, cut = rng.choice(buckets, 2, replace=False)
    lengths[lost] = -1
    lengths[cut] -= width
    buffer = np.concatenate((np.full(13, 255, np.uint8), encoded))  # something else before them
    wanted = rng.permutation(np.concatenate((ids, random_ids(rng, 100))))
    places = buckets_of(wanted, buckets)
    unavailable = np.isin([fmix64(key) * buckets >> 64 for key in wanted.tolist()], [lost, cut])
    for key, place, gone in zip(wanted, places, unavailable, strict=True):
        start = starts[place] + 13
        row = find(buffer[start:], key, int(lengths[place]), width=width, seed=table, number=place)
        if gone or int(key) not in row_of:
            assert row == (DAMAGED if gone else NOT_THERE)
        else:
            np.testing.assert_array_equal(buffer[start + row : start + row + width], row_of[int(key)])


def test_strings_that_are_no_buckets() -> None:
    seed = np.uint64(12)
    encoded, _ = encode_buckets(seed, 8, np.array([3]), np.zeros((1, 5), np.uint8), np.array([0, 1]))
    assert find(encoded, 3) == 14
    assert find(encoded, 4) == NOT_THERE
    assert find(encoded, 4, number=9) == DAMAGED  # that of another place
    for length in (-1, 0, 5, 6, len(encoded) - 1):
        assert find(encoded, 3, length) == DAMAGED
    for bit in range(8 * 14):  # of check, count and id: it may be another id that has become absent
        changed = encoded.copy()
        changed[bit // 8] ^= 1 << bit % 8
        assert find(changed, 4) in (DAMAGED, 14)
        assert find(changed, 5) in (DAMAGED, 14)
    assert find(np.zeros(6, np.uint8), 3) == DAMAGED
    encoded[2:6] = 255  # a count whose rows would be far outside
    assert find(encoded, 3) == DAMAGED
