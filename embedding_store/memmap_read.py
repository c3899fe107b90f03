"""Rows out of memory-mapped page files."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import FetchedRows, IdBatch, row_starts
from embedding_store.errors import StoreUnavailable
from embedding_store.mapped_rows import COLUMNS, FILE, SEED, WIDTH, fetch_rows
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.row_checks import table_seed

# Reading ahead costs 0.4 µs a row where everything is in memory, and saves 40 µs a page (on the disk it was measured
# on) where it is not. So it is done for a fetch after one that read two pages or more from disk.
_COLD_BLOCKS = 16  # of 512 bytes
_ADVICE = "torchrank publish BUNDLE --store URL writes it again"


class MappedTables:
    """The tables of one release, each mapped when first asked for. Thread-safe.

    A file that was cut off is noticed before its rows are read, and once more after; one that is cut off just while
    its rows are read can still kill the process by SIGBUS. No torchrank command cuts a release's file off.
    """

    def __init__(self, manifest: ReleaseManifest, folder: Path) -> None:
        """folder: that of the NAME.pages files."""
        self._manifest = manifest
        self._folder = folder
        self._widths = np.array([table.row_bytes for table in manifest.tables], np.int64)
        self._mapped = _Mapped(_nothing_mapped(manifest), {})
        self._cold = True
        self._lock = threading.Lock()

    def fetch(self, batch: IdBatch) -> FetchedRows:
        """See `Backend.fetch`; without a time limit, because reading mapped memory cannot be interrupted."""
        rows = np.empty(row_starts(batch, self._widths)[-1], np.uint8)
        status = np.empty(len(batch.ids), np.uint8)
        lost, damaged = self._read(batch, rows, status)
        error = None
        if lost >= 0:
            error = self._map(batch.tables[batch.counts > 0].tolist())
            lost, damaged = self._read(batch, rows, status)
        if lost >= 0 and error is None:
            error = StoreUnavailable(f"{self._path(lost, 'pages')} was cut off while it was read: damaged; {_ADVICE}")
        if damaged >= 0 and error is None:
            error = self._damaged(batch, damaged)
        return FetchedRows(rows, status, error)

    def _read(self, batch: IdBatch, rows: NDArray[np.uint8], status: NDArray[np.uint8]) -> tuple[int, int]:
        """Returns the place of a table that is not mapped or not whole, and of an id whose row is damaged, else -1."""
        mapped = self._mapped  # for the whole call: what it maps stays mapped as long
        lost, damaged, blocks = fetch_rows(
            mapped.columns, batch.tables, batch.counts, batch.ids, rows, status, self._cold
        )
        self._cold = blocks >= _COLD_BLOCKS
        return lost, damaged

    def _damaged(self, batch: IdBatch, position: int) -> StoreUnavailable:
        place = int(batch.tables[np.searchsorted(np.cumsum(batch.counts), position, side="right")])
        table, path = self._manifest.tables[place], self._path(place, "pages")
        return StoreUnavailable(
            f"{path}{' or its .ids' * table.sparse} has other bytes than were published, found at id "
            f"{batch.ids[position]} of table {table.name!r} of {self._manifest.name}: damaged; torchrank verify BUNDLE "
            "--store URL --mend writes it again"
        )

    def _map(self, places: Sequence[int]) -> StoreUnavailable | None:
        """Maps those of the tables that are not, or no longer whole; returns why one cannot be."""
        failure: StoreUnavailable | None = None
        with self._lock:
            columns, files = self._mapped.columns.copy(), dict(self._mapped.files)
            for place in places:
                if place in files and all(file.is_whole() for file in files[place]):
                    continue
                columns[place, FILE] = -1
                files.pop(place, None)
                try:
                    files[place] = self._open(place)
                    columns[place, :WIDTH] = _columns(self._manifest.tables[place], files[place])
                except StoreUnavailable as error:
                    failure = error
            self._mapped = _Mapped(columns, files)
        return failure

    def _open(self, place: int) -> tuple[_MappedFile, ...]:
        table = self._manifest.tables[place]
        sizes = {"pages": table.bytes, "ids": table.ids_bytes}
        return tuple(
            _MappedFile(self._path(place, kind), size, self._manifest.name) for kind, size in sizes.items() if size
        )

    def _path(self, place: int, kind: str) -> Path:
        return self._folder / f"{self._manifest.tables[place].name}.{kind}"


class _MappedFile:
    """Unmapped and closed when nobody holds it any more."""

    def __init__(self, path: Path, size: int, release: str) -> None:
        """Raises StoreUnavailable, naming the file, where it cannot be read or has another size."""
        self.descriptor = -1
        self.size = size
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
            found = os.fstat(self.descriptor).st_size
            if found == size:
                self._map = mmap.mmap(self.descriptor, size, prot=mmap.PROT_READ)
                # A missing page is read alone: with its neighbours, as is usual, it takes a hundred times as long.
                self._map.madvise(mmap.MADV_RANDOM)
        except OSError as error:
            advice = f"; {_ADVICE}" if isinstance(error, FileNotFoundError) else ""
            raise StoreUnavailable(f"cannot read {path}: {error.strerror}{advice}") from error
        if found != size:
            raise StoreUnavailable(f"{path} has {found} bytes; release {release} must have {size}: damaged; {_ADVICE}")
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data

    def is_whole(self) -> bool:
        return os.fstat(self.descriptor).st_size == self.size

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _Mapped(NamedTuple):
    """Never changed, only replaced."""

    columns: NDArray[np.int64]  # as `fetch_rows` wants it
    files: dict[int, tuple[_MappedFile, ...]]  # by the table's place


def _nothing_mapped(manifest: ReleaseManifest) -> NDArray[np.int64]:
    columns = np.full((len(manifest.tables), COLUMNS), -1, np.int64)
    columns[:, WIDTH] = [table.row_bytes for table in manifest.tables]
    columns[:, SEED] = [table_seed(table).view(np.int64) for table in manifest.tables]
    return columns


def _columns(table: TableInfo, files: tuple[_MappedFile, ...]) -> list[int]:
    """FILE … ROWS."""
    described = [part for file in files for part in (file.descriptor, file.address, file.size)]
    return [*described, *([] if table.sparse else [-1, -1, -1]), table.rows]
