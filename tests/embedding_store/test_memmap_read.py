"""Rows out of mapped files: every id against a dictionary, files that are cut off or gone, and what stays in memory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.codec import page_rows
from embedding_store.lookup import ABSENT, FOUND, UNAVAILABLE
from embedding_store.mapped_rows import fetch_rows, take_rows
from embedding_store.memmap_read import MappedTables
from embedding_store.pages import PageWriter
from embedding_store.release import CHECK_BYTES, Codec, ReleaseManifest, TableInfo
from embedding_store.row_checks import table_seed, with_checks
from embedding_store.sparse import NOT_THERE
from embedding_store.sparse_pages import SparsePageWriter, map_ids

EXTREMES = [0, -1, 2**63 - 1, -(2**63)]
SEEDS = range(4)


@dataclass
class Tables:
    folder: Path
    manifest: ReleaseManifest
    rows: list[dict[int, bytes]]  # by the table's place: id -> encoded row


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """Dense and sparse tables of several widths, one of them empty but for its extreme ids."""
    rng = np.random.default_rng(5)
    shapes: list[tuple[Codec, int, int, bool]] = [
        ("fp32", 1000, 16, False), ("int8", 300, 9, False), ("fp16", 2000, 5, True), ("fp32", 0, 1, True),
        ("fp16", 1, 3, False),
    ]  # fmt: skip
    infos, rows = [], []
    for place, (codec, count, dim, sparse) in enumerate(shapes):
        name = f"t{place}"
        ids = np.arange(count)
        if sparse:
            ids = np.unique(np.concatenate((rng.integers(-(2**63), 2**63 - 1, count), np.array(EXTREMES))))
        values = rng.standard_normal((len(ids), dim)).astype(np.float32)
        if sparse:
            with SparsePageWriter(tmp_path, name, codec, dim) as sparse_writer:
                sparse_writer.append(ids, values)
                infos.append(sparse_writer.finish())
            ids = map_ids(tmp_path, infos[-1])
        else:
            with PageWriter(tmp_path, name, codec, dim) as writer:
                writer.append(values)
                infos.append(writer.finish())
        encoded = np.fromfile(tmp_path / f"{name}.pages", np.uint8).reshape(len(ids), -1)[:, :-CHECK_BYTES]
        rows.append({key: row.tobytes() for key, row in zip(ids.tolist(), encoded, strict=True)})
    return Tables(tmp_path, ReleaseManifest("m", "1", "", tuple(infos)), rows)


def random_batch(rng: np.random.Generator, tables: Tables) -> IdBatch:
    """Of some tables in any order: known ids, unknown ones, extremes; some tables without ids."""
    chosen = rng.permutation(len(tables.rows))[: rng.integers(1, len(tables.rows) + 1)]
    parts = []
    for place in chosen.tolist():
        known = rng.permutation(np.array(list(tables.rows[place]), np.int64))[: rng.integers(0, 200)]
        others = rng.integers(-(2**63), 2**63 - 1, rng.integers(0, 20))
        ids = np.unique(np.concatenate((known, others, np.array([*EXTREMES, 300, 1000]))))
        parts.append(rng.permutation(ids) if rng.random() < 0.8 else np.empty(0, np.int64))
    return IdBatch(chosen, np.array([len(ids) for ids in parts]), np.concatenate(parts))


def check(tables: Tables, batch: IdBatch, fetched: FetchedRows, lost: frozenset[int] = frozenset()) -> None:
    position = start = 0
    for place, count in zip(batch.tables.tolist(), batch.counts.tolist(), strict=True):
        width = tables.manifest.tables[place].row_bytes
        for key in batch.ids[position : position + count].tolist():
            row = tables.rows[place].get(key)
            expected = UNAVAILABLE if place in lost else ABSENT if row is None else FOUND
            assert fetched.status[position] == expected, (place, key)
            if expected == FOUND:
                assert fetched.rows[start : start + width].tobytes() == row, (place, key)
            position, start = position + 1, start + width
    assert (len(fetched.status), len(fetched.rows)) == (position, start)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_id_of_every_table(tables: Tables, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mapped = MappedTables(tables.manifest, tables.folder)
    for _ in range(20):
        batch = random_batch(rng, tables)
        fetched = mapped.fetch(batch)
        check(tables, batch, fetched)
        assert fetched.error is None


@pytest.mark.parametrize("place", [2, 3])
def test_where_a_search_ended_does_not_matter(tables: Tables, place: int) -> None:
    """It may have gone by ids that were garbage, and have been mended before anybody looked at their checks."""
    rng = np.random.default_rng(7)
    mapped = MappedTables(tables.manifest, tables.folder)
    mapped.fetch(IdBatch(np.array([place]), np.ones(1, np.int64), np.zeros(1, np.int64)))  # maps it
    known = np.array(list(tables.rows[place]), np.int64)
    ids = rng.permutation(np.concatenate((known, known + 1, rng.integers(-(2**63), 2**63 - 1, 500))))
    batch = IdBatch(np.array([place]), np.array([len(ids)]), ids)
    rows, status = np.empty(len(ids) * tables.manifest.tables[place].row_bytes, np.uint8), np.empty(len(ids), np.uint8)
    for _ in range(20):
        ended = NOT_THERE - rng.integers(0, len(known) + 1, len(ids))
        unsure = take_rows(mapped._mapped.columns[place], ids, ended, rows, np.empty(len(ids), np.uint64), status)
        assert unsure == -1
        check(tables, batch, FetchedRows(rows, status))


@pytest.mark.parametrize("ahead", [False, True])
def test_reading_ahead_changes_nothing_in_the_answer(tables: Tables, ahead: bool) -> None:
    rng = np.random.default_rng(1)
    mapped = MappedTables(tables.manifest, tables.folder)
    mapped.fetch(IdBatch(np.arange(5), np.ones(5, np.int64), np.zeros(5, np.int64)))  # maps all
    for _ in range(20):
        for table in tables.manifest.tables:
            forget(tables.folder / f"{table.name}.pages")
        batch = random_batch(rng, tables)
        widths = np.array([table.row_bytes for table in tables.manifest.tables])
        rows = np.empty(int(batch.counts @ widths[batch.tables]), np.uint8)
        status = np.empty(len(batch.ids), np.uint8)
        columns = mapped._mapped.columns
        lost, damaged, _ = fetch_rows(columns, batch.tables, batch.counts, batch.ids, rows, status, ahead)
        assert (lost, damaged) == (-1, -1)
        check(tables, batch, FetchedRows(rows, status))


def forget(path: Path) -> None:
    """Drops the file from the system's memory: the next reading comes from disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("kind", ["pages", "ids"])
def test_a_file_that_is_cut_off_while_mapped_is_told_and_comes_back(tables: Tables, kind: str) -> None:
    rng = np.random.default_rng(2)
    mapped = MappedTables(tables.manifest, tables.folder)
    batch = random_batch(rng, tables)
    while 2 not in batch.tables[batch.counts > 0]:
        batch = random_batch(rng, tables)
    check(tables, batch, mapped.fetch(batch))
    path = tables.folder / f"t2.{kind}"
    whole = path.read_bytes()
    for size in (len(whole) - 1, 4096, 0):
        os.truncate(path, size)
        fetched = mapped.fetch(batch)
        check(tables, batch, fetched, lost=frozenset({2}))
        assert f"t2.{kind} has {size} bytes; release m@1 must have {len(whole)}: damaged" in str(fetched.error)
    path.write_bytes(whole)
    fetched = mapped.fetch(batch)
    check(tables, batch, fetched)
    assert fetched.error is None


def test_a_file_that_is_not_there_loses_its_table_only(tables: Tables) -> None:
    (tables.folder / "t3.ids").rename(tables.folder / "elsewhere")
    mapped = MappedTables(tables.manifest, tables.folder)
    batch = IdBatch(np.array([3, 0]), np.array([2, 2]), np.array([0, 1, 7, -1]))
    fetched = mapped.fetch(batch)
    check(tables, batch, fetched, lost=frozenset({3}))
    assert "t3.ids: No such file or directory" in str(fetched.error)
    (tables.folder / "elsewhere").rename(tables.folder / "t3.ids")
    check(tables, batch, mapped.fetch(batch))


def test_a_release_of_ten_gigabytes_opens_at_once_and_takes_the_memory_that_was_touched(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    batch = IdBatch(np.arange(10), np.full(10, 100), rng.integers(0, 8_000_000, 1000))
    infos = [TableInfo(f"t{place}", 8_000_000, 32, "fp32", 128, page_rows(128), "") for place in range(10)]
    for info, ids in zip(infos, batch.ids.reshape(10, 100), strict=True):
        with (tmp_path / f"{info.name}.pages").open("wb") as file:
            file.truncate(info.bytes)  # without blocks on disk, which reads as zeros, but for the rows that are asked
            for key, row in zip(ids, with_checks(table_seed(info), ids, np.zeros((100, 128), np.uint8)), strict=True):
                file.seek(int(key) * info.stored_bytes)
                file.write(row.data)
    mapped = MappedTables(ReleaseManifest("m", "1", "", tuple(infos)), tmp_path)
    mapped.fetch(IdBatch(np.arange(10), np.zeros(10, np.int64), np.empty(0, np.int64)))  # compiles, maps nothing
    before, began = resident_file_bytes(), time.monotonic()
    fetched = mapped.fetch(batch)
    took, grew = time.monotonic() - began, resident_file_bytes() - before
    assert (fetched.status == FOUND).all()
    assert not fetched.rows.any()
    assert took < 1
    assert grew <= 2 * 1000 * 4096  # a row lies in one page, seldom in two


def resident_file_bytes() -> int:
    """Of this process, backed by files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssFile")).split()[1])
