"""Small bundles with random tables, and what a store must answer for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import Backend
from embedding_store.batch import batch_of
from embedding_store.codec import decode, encode
from embedding_store.lookup import FOUND
from embedding_store.pages import PageWriter
from embedding_store.release import Codec, ReleaseManifest, TableInfo
from embedding_store.sparse_pages import SparsePageWriter


@dataclass
class TestTable:
    __test__ = False
    name: str
    codec: Codec
    rows: int
    dim: int
    hot: int = 0
    default: bool = False
    sparse: bool = False  # raw 64-bit ids


TABLES = (
    TestTable("item", "fp16", rows=5000, dim=16, hot=500),
    TestTable("wide.item", "fp32", rows=5000, dim=1, default=True),
    TestTable("user", "fp32", rows=1300, dim=32, hot=100, default=True),  # 62 rows a page: pages of 8,060 bytes
    TestTable("small", "int8", rows=700, dim=10, hot=20, default=True),
    TestTable("tiny", "fp16", rows=1, dim=3),
    TestTable("page", "fp32", rows=124, dim=32, hot=124),  # two full pages, exactly
    TestTable("broad", "fp32", rows=9, dim=3000),  # a row larger than a page
)


@dataclass
class Bundle:
    folder: Path
    manifest: ReleaseManifest
    values: dict[str, NDArray[np.float32]]  # [rows + 1, dim], as the codec keeps them; the last is the default row
    hot: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    raw: dict[str, dict[int, int]] = field(default_factory=dict)  # of sparse tables: id -> place in `values`

    @property
    def name(self) -> str:
        return self.manifest.name

    def expected(self, table: str, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Values [n, dim] and found [n], by a loop."""
        values = self.values[table]
        places = self.raw.get(table) or {row: row for row in range(len(values) - 1)}
        found = np.array([key in places for key in ids.tolist()], np.bool_)
        rows = [values[places.get(key, -1)] for key in ids.tolist()]
        return np.array(rows, np.float32).reshape(len(ids), values.shape[1]), found


def rounded(codec: Codec, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    if codec == "int8":  # its arithmetic has tests of its own, in test_codec.py
        return decode(codec, encode(codec, rows))
    return rows.astype(np.float16).astype(np.float32) if codec == "fp16" else rows


def make_bundle(
    folder: Path,
    seed: int,
    *,
    model: str = "demo",
    version: str = "1",
    created: str = "2026-01-02T03:04:05Z",
    tables: tuple[TestTable, ...] = TABLES,
) -> Bundle:
    rng = np.random.default_rng(seed)
    (folder / "tables").mkdir(parents=True)
    infos = []
    values, hot, raw = {}, {}, {}
    for table in tables:
        rows = rng.standard_normal((table.rows + 1, table.dim)).astype(np.float32)
        hot_ids = rng.permutation(table.rows)[: table.hot].astype(np.int64)
        if not table.default:
            rows[-1] = 0
        if table.sparse:
            ids = raw_ids(rng, table.rows)
            raw[table.name] = {key: place for place, key in enumerate(ids.tolist())}
            hot_ids = ids[hot_ids]
            infos.append(_write_sparse(folder, table, ids, rows, hot_ids))
        else:
            infos.append(_write_dense(folder, table, rows, hot_ids))
        values[table.name], hot[table.name] = rounded(table.codec, rows), hot_ids
    manifest = ReleaseManifest(model, version, created, tuple(infos))
    content = msgspec.to_builtins(manifest) | {"features": "more keys than a store reads"}
    (folder / "manifest.json").write_bytes(msgspec.json.encode(content))
    return Bundle(folder, manifest, values, hot, raw)


def _write_dense(folder: Path, table: TestTable, rows: NDArray[np.float32], hot: NDArray[np.int64]) -> TableInfo:
    """rows: the last is the default row."""
    with PageWriter(folder / "tables", table.name, table.codec, table.dim) as writer:
        for start in range(0, table.rows, 777):
            writer.append(rows[start : min(start + 777, table.rows)])
        return writer.finish(hot_ids=hot, default_row=rows[-1] if table.default else None)


def _write_sparse(
    folder: Path, table: TestTable, ids: NDArray[np.int64], rows: NDArray[np.float32], hot: NDArray[np.int64]
) -> TableInfo:
    with SparsePageWriter(folder / "tables", table.name, table.codec, table.dim) as writer:
        for start in range(0, table.rows, 777):
            end = min(start + 777, table.rows)
            writer.append(ids[start:end], rows[start:end])
        return writer.finish(hot_ids=hot, default_row=rows[-1] if table.default else None)


def raw_ids(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    """Distinct, in random order, the extremes of int64 among them where there is room."""
    ids = np.concatenate((np.array([0, -1, 2**63 - 1, -(2**63)]), rng.integers(-(2**63), 2**63 - 1, n)))
    return rng.permutation(np.unique(ids[:n]))


def fetch(
    backend: Backend, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    """Per table rows uint8 [n, row_bytes] and found bool [n]. Raises what kept the backend from answering in full."""
    manifest = backend.manifest(release)
    batch = batch_of(manifest, ids)
    fetched = backend.fetch(release, batch, timeout=timeout)
    if fetched.error is not None:
        raise fetched.error
    answer, byte, row = {}, 0, 0
    for name, wanted in ids.items():
        size = len(wanted) * manifest.table(name).row_bytes
        rows = fetched.rows[byte : byte + size].reshape(len(wanted), manifest.table(name).row_bytes)
        answer[name] = rows, fetched.status[row : row + len(wanted)] == FOUND
        byte += size
        row += len(wanted)
    return answer


def check_rows(
    bundle: Bundle, table: str, ids: NDArray[np.int64], rows: NDArray[np.uint8], found: NDArray[np.bool_]
) -> None:
    """rows uint8 [n, row_bytes], compared where found."""
    expected, present = bundle.expected(table, ids)
    np.testing.assert_array_equal(found, present)
    got = decode(bundle.manifest.table(table).codec, rows[present])  # the others' bytes mean nothing
    np.testing.assert_array_equal(got, expected[present])


def check_release(backend: Backend, bundle: Bundle) -> None:
    """Every row of every table, some absent ids, and the hot lists."""
    for table in bundle.manifest.tables:
        known = np.array(list(bundle.raw.get(table.name, range(table.rows))), np.int64)
        absent = np.setdiff1d(np.array([-5, table.rows, 2**40, -(2**40)], np.int64), known)
        ids = np.concatenate((known, absent))
        check_rows(bundle, table.name, ids, *fetch(backend, bundle.name, {table.name: ids})[table.name])
        np.testing.assert_array_equal(backend.hot_ids(bundle.name, table.name), bundle.hot[table.name])
