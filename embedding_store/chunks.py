"""A bundle's tables in pieces that fit in memory: what a publisher writes, reads back and compares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.buckets import bucket_bounds
from embedding_store.release import TableInfo
from embedding_store.row_checks import table_seed, with_checks


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Whole pages of a table, or buckets, where it is sparse: those from `first_page` on.

    bounds: int64 [pages + 1], in rows: page first_page + k holds the rows bounds[k] … bounds[k + 1] - 1 of the chunk.
    rows: uint8 [n, stored_bytes], as stored; ids: int64 [n] of a sparse table, else int64 [0].
    """

    first_page: int
    first_row: int
    bounds: NDArray[np.int64]
    rows: NDArray[np.uint8]
    ids: NDArray[np.int64]

    @property
    def pages(self) -> int:
        return len(self.bounds) - 1

    @property
    def end(self) -> int:
        """The page after the last."""
        return self.first_page + self.pages

    @property
    def bytes(self) -> int:
        return self.rows.nbytes + self.ids.nbytes

    def part(self, first: int, end: int) -> Chunk:
        """Its pages first … end - 1, as the table counts them."""
        bounds = self.bounds[first - self.first_page : end - self.first_page + 1]
        rows = slice(bounds[0], bounds[-1])
        return Chunk(first, self.first_row + int(bounds[0]), bounds - bounds[0], self.rows[rows], self.ids[rows])


class Checksum:
    """Of a table's files, as far as chunks were added."""

    def __init__(self, table: TableInfo) -> None:
        self._table = table
        self._rows = hashlib.sha256()
        self._ids = hashlib.sha256()

    def add(self, chunk: Chunk) -> None:
        self._rows.update(chunk.rows.data)
        self._ids.update(chunk.ids.data)

    def digest(self) -> str:
        return f"{self._rows.hexdigest()}{self._ids.hexdigest()}"

    def wrong_file(self) -> str | None:
        """Name of the file that is not what the manifest states; None where both are."""
        if self._rows.hexdigest() != self._table.sha256:
            return f"{self._table.name}.pages"
        if self._table.sparse and self._ids.hexdigest() != self._table.ids_sha256:
            return f"{self._table.name}.ids"
        return None


def whole_table(table: TableInfo, content: bytes, ids: NDArray[np.int64] | None = None) -> Chunk:
    """One chunk of a table that is in memory. content: its encoded rows, one after another, without checks."""
    encoded = np.frombuffer(content, np.uint8).reshape(-1, table.row_bytes)
    rows = with_checks(table_seed(table), np.arange(table.rows) if ids is None else ids, encoded)
    none = np.empty(0, np.int64)
    bounds = page_bounds(table, 0, table.pages) if ids is None else bucket_bounds(ids, 0, table.pages, table.pages)
    return Chunk(0, 0, bounds, rows, none if ids is None else ids)


def page_bounds(table: TableInfo, first_page: int, pages: int) -> NDArray[np.int64]:
    """Chunk.bounds of a table of dense ids."""
    starts = np.arange(first_page, first_page + pages + 1, dtype=np.int64) * table.page_rows
    bounds: NDArray[np.int64] = np.minimum(starts, table.rows) - starts[0]
    return bounds
