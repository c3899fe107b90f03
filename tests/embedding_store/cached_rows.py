"""Rows that tell which release, table and id they belong to, in every 8 bytes, and a cache that is asked for them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import IdBatch, batch_of, row_starts
from embedding_store.cache_owners import CachedTables
from embedding_store.hot_cache import HotCache
from embedding_store.lookup import ABSENT, FOUND
from embedding_store.release import ReleaseManifest, TableInfo

Ids = NDArray[np.int64]
UNTOUCHED = 255  # a status


def table_of(name: str, rows: int, width: int, *, sparse: bool = False) -> TableInfo:
    return TableInfo(
        name=name, rows=rows, dim=width // 4, codec="fp32", row_bytes=width, page_rows=1, sha256="",
        default_row=bytes([9]) * width, ids="sparse" if sparse else "dense",
    )  # fmt: skip


def manifest_of(*tables: TableInfo, model: str = "m", version: str = "1") -> ReleaseManifest:
    return ReleaseManifest(model, version, "2026-01-01T00:00:00Z", tables)


def rows_of(manifest: ReleaseManifest, place: int, ids: Ids) -> NDArray[np.uint8]:
    """uint8 [n, row_bytes]; where two rows are mixed up, or halves of two, it shows."""
    table = manifest.tables[place]
    seed = zlib.crc32(f"{manifest.name} {table.name}".encode())
    words = np.arange(-(-table.row_bytes // 8), dtype=np.uint64) + np.uint64(seed)
    mixed = ids.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) ^ words * np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(32)
    return (mixed * np.uint64(0xD6E8FEB86659FD93)).view(np.uint8)[:, : table.row_bytes]


class Asked:
    """A cache and one release. Ids in 0 … rows-1 exist, others do not."""

    def __init__(self, cache: HotCache, manifest: ReleaseManifest) -> None:
        self.cache = cache
        self.manifest = manifest
        self.tables: CachedTables = cache.tables(manifest)
        self._widths = np.array([table.row_bytes for table in manifest.tables], np.int64)
        self._limits = np.array([table.rows for table in manifest.tables], np.int64)

    def ask(self, ids: Mapping[str, Ids] | Ids, *, insert: bool = True, record: bool = True) -> NDArray[np.bool_]:
        """Probes, checks every hit, inserts the misses; which ids hit, bool [n]."""
        batch = self._batch(ids)
        starts = row_starts(batch, self._widths)
        out = np.full(starts[-1], 7, np.uint8)
        status = np.full(len(batch.ids), UNTOUCHED, np.uint8)
        misses = self.cache.probe(self.tables, batch, out, starts[:-1], status, record=record)
        assert (np.diff(misses) > 0).all()
        hit = np.ones(len(batch.ids), np.bool_)
        hit[misses] = False
        right, expected = self._answer(batch)
        assert (status[~hit] == UNTOUCHED).all()
        np.testing.assert_array_equal(status[hit], expected[hit])
        mask = np.repeat(hit, np.repeat(self._widths[batch.tables], batch.counts))
        np.testing.assert_array_equal(out[mask], right[mask])
        if insert:
            self.insert(batch.select(misses))
        return hit

    def insert(self, batch: IdBatch, *, warming: bool = False) -> None:
        rows, status = self._answer(batch)
        self.cache.insert(self.tables, batch, rows, status, warming=warming)

    def warm(self, ids: Ids) -> None:
        self.insert(self._batch(ids), warming=True)

    def held(self, ids: Mapping[str, Ids] | Ids) -> NDArray[np.bool_]:
        return self.ask(ids, insert=False, record=False)

    def _batch(self, ids: Mapping[str, Ids] | Ids) -> IdBatch:
        return batch_of(self.manifest, ids if isinstance(ids, Mapping) else {self.manifest.tables[0].name: ids})

    def _answer(self, batch: IdBatch) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """What a backend would give, with the default row where there is none."""
        limit = np.repeat(self._limits[batch.tables], batch.counts)
        status = np.where((batch.ids >= 0) & (batch.ids < limit), FOUND, ABSENT).astype(np.uint8)
        rows = [np.empty(0, np.uint8)]
        start = 0
        for place, count in zip(batch.tables.tolist(), batch.counts.tolist(), strict=True):
            some = rows_of(self.manifest, place, batch.ids[start : start + count])
            rows.append(np.where(status[start : start + count, None] == FOUND, some, 9).astype(np.uint8).ravel())
            start += count
        return np.concatenate(rows), status
