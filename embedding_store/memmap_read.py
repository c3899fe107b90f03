"""Rows out of memory-mapped page files."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import FetchedRows, IdBatch, row_starts
from embedding_store.errors import StoreUnavailable
from embedding_store.gather import take_rows
from embedding_store.lookup import ABSENT, FOUND, UNAVAILABLE
from embedding_store.release import ReleaseManifest, TableInfo


class MappedTables:
    """The tables of one release, each mapped when first asked for. Thread-safe."""

    def __init__(self, manifest: ReleaseManifest, folder: Path) -> None:
        """folder: that of the NAME.pages files."""
        self._manifest = manifest
        self._folder = folder
        self._widths = np.array([table.row_bytes for table in manifest.tables], np.int64)
        self._maps: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def fetch(self, batch: IdBatch) -> FetchedRows:
        """See `Backend.fetch`; without a time limit, because reading mapped memory cannot be interrupted."""
        starts = row_starts(batch, self._widths)
        rows = np.empty(starts[-1], np.uint8)
        found = np.empty(len(batch.ids), np.bool_)
        status = np.empty(len(batch.ids), np.uint8)
        error: StoreUnavailable | None = None
        first = 0
        for number, (place, count) in enumerate(zip(batch.tables.tolist(), batch.counts.tolist(), strict=True)):
            last = first + count
            part = rows[starts[number] : starts[number + 1]].reshape(count, self._widths[place])
            try:
                take_rows(self._map(place), batch.ids[first:last], part, found[first:last])
                status[first:last] = np.where(found[first:last], FOUND, ABSENT)
            except StoreUnavailable as damaged:
                status[first:last] = UNAVAILABLE
                error = error or damaged
            first = last
        return FetchedRows(rows, status, error)

    def _map(self, place: int) -> NDArray[np.uint8]:
        """uint8 [rows, row_bytes], read only, backed by the pages file."""
        known = self._maps.get(place)
        if known is not None:
            return known
        pages = _mapped(self._folder, self._manifest, self._manifest.tables[place])
        with self._lock:
            return self._maps.setdefault(place, pages)


def _mapped(folder: Path, manifest: ReleaseManifest, table: TableInfo) -> NDArray[np.uint8]:
    path = folder / f"{table.name}.pages"
    try:
        size = path.stat().st_size
        if size != table.bytes:  # reading past the end of a mapped file would kill the process
            raise StoreUnavailable(f"{path} has {size} bytes; release {manifest.name} must have {table.bytes}: damaged")
        return np.asarray(np.memmap(path, np.uint8, "r", shape=(table.rows, table.row_bytes)))
    except OSError as error:
        if isinstance(error, StoreUnavailable):
            raise
        raise StoreUnavailable(f"cannot read {path}: {error.strerror}") from error
