"""Files of a bundle's tables: NAME.pages (encoded rows, each with its check) and NAME.hot (the most frequent ids).

Layout: `release.TableInfo`. Pages lie one after another without padding, so writing needs no page buffer. Tables of raw
64-bit ids: `sparse_pages.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embedding_store.chunks import Chunk, page_bounds
from embedding_store.codec import check_name, check_table, encode_table, page_rows, row_bytes
from embedding_store.errors import InvalidRelease
from embedding_store.release import Codec, TableInfo
from embedding_store.row_checks import seed_of, with_checks


class PageWriter:
    """Streams one table into FOLDER/NAME.pages; holds a chunk at a time, never the table.

        with PageWriter(folder, "item_id", "fp16", dim=16) as writer:
            for rows in chunks:                  # float32 [n, 16], in order of the ids 0, 1, …
                writer.append(rows)
            table = writer.finish(hot_ids=ids)   # int64 [k], most frequent first

    The file has its name only when `finish` has returned; leaving the block before removes what was written.
    """

    def __init__(self, folder: Path, name: str, codec: Codec, dim: int) -> None:
        self._folder = folder
        self._name = check_name("table", name)
        self._codec = codec
        self._dim = dim
        self._seed = seed_of(name, codec, dim)
        self._rows = 0
        self._hash = hashlib.sha256()
        self._partial = folder / f"{name}.pages.partial"
        self._file = self._partial.open("wb")

    def append(self, rows: NDArray[np.float32]) -> None:
        """The next rows, float32 [n, dim]. Raises InvalidRelease for a value that the codec cannot hold."""
        if rows.ndim != 2 or rows.shape[1] != self._dim:
            raise InvalidRelease(f"table {self._name!r}: rows are {list(rows.shape)}; expected [n, {self._dim}]")
        ids = np.arange(self._rows, self._rows + len(rows))
        stored = with_checks(self._seed, ids, encode_table(self._name, self._codec, rows, ids))
        self._hash.update(stored.data)
        self._file.write(stored.data)
        self._rows += len(rows)

    def finish(
        self, *, hot_ids: NDArray[np.int64] | None = None, default_row: NDArray[np.float32] | None = None
    ) -> TableInfo:
        """`default_row` float32 [dim] answers for absent ids; zeros where None."""
        if not self._rows:
            raise InvalidRelease(f"table {self._name!r} has no rows")
        self._file.close()
        hot = np.empty(0, np.int64) if hot_ids is None else hot_ids
        if len(hot):
            write_hot(self._folder, self._name, hot, rows=self._rows)
        width = row_bytes(self._codec, self._dim)
        table = TableInfo(
            name=self._name,
            rows=self._rows,
            dim=self._dim,
            codec=self._codec,
            row_bytes=width,
            page_rows=page_rows(width),
            sha256=self._hash.hexdigest(),
            hot_ids=len(hot),
            default_row=encode_default(self._name, self._codec, default_row),
        )
        check_table(table)
        self._partial.replace(self._folder / f"{self._name}.pages")
        return table

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def encode_default(table: str, codec: Codec, row: NDArray[np.float32] | None) -> bytes:
    """As TableInfo.default_row; row: float32 [dim]."""
    if row is None:
        return b""
    return encode_table(f"{table} (default row)", codec, row.reshape(1, -1), range(1)).tobytes()


def page_chunks(folder: Path, table: TableInfo, pages_at_once: int) -> Iterator[Chunk]:
    """All pages of a table of dense ids out of FOLDER/NAME.pages, in their order. Raises InvalidRelease."""
    no_ids = np.empty(0, np.int64)
    with open_pages(folder, table) as file:
        for first_page in range(0, table.pages, pages_at_once):
            bounds = page_bounds(table, first_page, min(pages_at_once, table.pages - first_page))
            rows = np.fromfile(file, np.uint8, int(bounds[-1]) * table.stored_bytes).reshape(-1, table.stored_bytes)
            yield Chunk(first_page, first_page * table.page_rows, bounds, rows, no_ids)


def open_pages(folder: Path, table: TableInfo) -> BufferedReader:
    """FOLDER/NAME.pages for reading. Raises InvalidRelease where it has another size than the manifest states."""
    path = folder / f"{table.name}.pages"
    check_size(path, table.bytes, f"{table.rows} rows of {table.row_bytes}, and their checks, take")
    return path.open("rb")


def check_size(path: Path, expected: int, what_takes: str) -> None:
    """Raises InvalidRelease."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InvalidRelease(f"cannot read {path}: {error.strerror}") from error
    if size != expected:
        raise InvalidRelease(f"{path} has {size} bytes; {what_takes} {expected}")


def write_hot(folder: Path, name: str, ids: NDArray[np.int64], *, rows: int | None = None) -> None:
    """FOLDER/NAME.hot: little-endian int64, most frequent first. Raises InvalidRelease for ids outside 0 … rows - 1
    (None: a table of raw ids, which may be any)."""
    _check_hot(name, ids, rows)
    (folder / f"{name}.hot").write_bytes(ids.astype("<i8").tobytes())


def read_hot(folder: Path, table: TableInfo) -> NDArray[np.int64]:
    """int64 [table.hot_ids]. Raises InvalidRelease where file and manifest disagree."""
    if not table.hot_ids:
        return np.empty(0, np.int64)
    path = folder / f"{table.name}.hot"
    check_size(path, 8 * table.hot_ids, f"{table.hot_ids} ids take")
    ids = np.fromfile(path, "<i8").astype(np.int64)
    _check_hot(table.name, ids, None if table.sparse else table.rows)
    return ids


def _check_hot(name: str, ids: NDArray[np.int64], rows: int | None) -> None:
    if rows is not None and len(outside := ids[(ids < 0) | (ids >= rows)]):
        raise InvalidRelease(f"table {name!r}: hot id {int(outside[0])} is outside 0 … {rows - 1}")
    if len(np.unique(ids)) != len(ids):
        raise InvalidRelease(f"table {name!r}: the hot list names an id twice")
