"""Files of a bundle's table of raw 64-bit ids: as of any table, and NAME.ids; rows in the order of `sparse.py`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embedding_store.buckets import ID_BYTES, bucket_bounds
from embedding_store.chunks import Chunk
from embedding_store.codec import bucket_rows, check_name, check_table, encode_table, row_bytes
from embedding_store.errors import InvalidRelease
from embedding_store.pages import check_size, encode_default, open_pages, write_hot
from embedding_store.release import CHECK_BYTES, Codec, TableInfo
from embedding_store.row_checks import seed_of, with_checks
from embedding_store.sparse import NOT_THERE, mixed_ids

_PART_BITS = 8


class SparsePageWriter:
    """Writes one table of raw ids into FOLDER/NAME.pages and FOLDER/NAME.ids.

        with SparsePageWriter(folder, "item_id", "fp16", dim=16) as writer:
            for ids, rows in chunks:             # int64 [n], float32 [n, 16], in any order
                writer.append(ids, rows)
            table = writer.finish(hot_ids=ids)   # int64 [k], most frequent first

    Rows go to 256 files first, by the first bits of their mixed ids, and are sorted file by file: it holds a chunk or
    a 256th of the table at a time, and takes the table's size on disk twice for as long as it works. The files have
    their names only when `finish` has returned; leaving the block before removes what was written.
    """

    def __init__(self, folder: Path, name: str, codec: Codec, dim: int) -> None:
        self._folder = folder
        self._name = check_name("table", name)
        self._codec = codec
        self._dim = dim
        self._width = row_bytes(codec, dim)
        self._seed = seed_of(name, codec, dim)
        self._rows = 0
        self._parts = folder / f"{name}.parts"
        self._parts.mkdir()

    def append(self, ids: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """ids int64 [n], rows float32 [n, dim]. Raises InvalidRelease for a value that the codec cannot hold."""
        if ids.shape != (len(rows),) or ids.dtype != np.int64 or rows.shape[1:] != (self._dim,):
            raise InvalidRelease(
                f"table {self._name!r}: ids are {ids.dtype} {list(ids.shape)} and rows {list(rows.shape)}; "
                f"expected int64 [n] and [n, {self._dim}]"
            )
        stored = with_checks(self._seed, ids, encode_table(self._name, self._codec, rows, ids))
        part_of = (mixed_ids(ids) >> np.uint64(64 - _PART_BITS)).astype(np.uint8)
        order = np.argsort(part_of, kind="stable")
        records = np.concatenate((_as_bytes(ids), stored), axis=1)[order]
        ends = np.cumsum(np.bincount(part_of, minlength=1 << _PART_BITS))
        for part, records_of_part in enumerate(np.split(records, ends[:-1])):
            if len(records_of_part):
                with self._part(part).open("ab") as file:
                    file.write(records_of_part.data)
        self._rows += len(rows)

    def finish(
        self, *, hot_ids: NDArray[np.int64] | None = None, default_row: NDArray[np.float32] | None = None
    ) -> TableInfo:
        """`default_row` float32 [dim] answers for absent ids; zeros where None. Raises InvalidRelease for an id that
        was given twice."""
        if not self._rows:
            raise InvalidRelease(f"table {self._name!r} has no rows")
        digests = self._write_sorted()
        hot = np.empty(0, np.int64) if hot_ids is None else hot_ids
        if len(hot):
            write_hot(self._folder, self._name, hot)
        table = TableInfo(
            name=self._name,
            rows=self._rows,
            dim=self._dim,
            codec=self._codec,
            row_bytes=self._width,
            page_rows=bucket_rows(self._width),
            sha256=digests["pages"],
            hot_ids=len(hot),
            default_row=encode_default(self._name, self._codec, default_row),
            ids="sparse",
            ids_sha256=digests["ids"],
        )
        check_table(table)
        for kind in digests:
            (self._parts / kind).replace(self._folder / f"{self._name}.{kind}")
        return table

    def _write_sorted(self) -> dict[str, str]:
        """PARTS/ids and PARTS/pages out of the parts; returns their checksums."""
        pages_hash, ids_hash = hashlib.sha256(), hashlib.sha256()
        with (self._parts / "pages").open("wb") as pages_file, (self._parts / "ids").open("wb") as ids_file:
            for part in range(1 << _PART_BITS):
                ids, rows = self._sorted_part(part)
                for content, file, digest in ((ids, ids_file, ids_hash), (rows, pages_file, pages_hash)):
                    file.write(content.data)
                    digest.update(content.data)
        return {"pages": pages_hash.hexdigest(), "ids": ids_hash.hexdigest()}

    def _sorted_part(self, part: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        path = self._part(part)
        content = np.fromfile(path, np.uint8) if path.exists() else np.empty(0, np.uint8)
        path.unlink(missing_ok=True)
        records = content.reshape(-1, ID_BYTES + self._width + CHECK_BYTES)
        ids = np.ascontiguousarray(records[:, :ID_BYTES]).view(np.int64).reshape(-1)
        order = np.argsort(mixed_ids(ids))
        ids = ids[order]
        twice = ids[1:] == ids[:-1]
        if twice.any():
            raise InvalidRelease(f"table {self._name!r}: id {int(ids[np.argmax(twice)])} is given twice")
        return ids, records[order, ID_BYTES:]

    def _part(self, part: int) -> Path:
        return self._parts / f"{part}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._parts)


def bucket_chunks(folder: Path, table: TableInfo, buckets_at_once: int) -> Iterator[Chunk]:
    """All buckets of a table of raw ids out of FOLDER/NAME.ids and FOLDER/NAME.pages, in their order.

    Raises InvalidRelease for files of another size than the manifest states, and for ids that are out of order.
    """
    ids = map_ids(folder, table)
    with open_pages(folder, table) as pages:
        row = 0
        for first in range(0, table.pages, buckets_at_once):
            count = min(buckets_at_once, table.pages - first)
            bounds = bucket_bounds(ids[row:], first, count, table.pages)
            last = row + int(bounds[-1])
            if bounds[-1] == NOT_THERE or (first + count == table.pages and last != table.rows):
                raise InvalidRelease(f"{folder / table.name}.ids has ids out of their order: damaged")
            rows = np.fromfile(pages, np.uint8, (last - row) * table.stored_bytes).reshape(-1, table.stored_bytes)
            yield Chunk(first, row, bounds, rows, np.array(ids[row:last]))
            row = last


def map_ids(folder: Path, table: TableInfo) -> NDArray[np.int64]:
    """int64 [table.rows], read only, backed by FOLDER/NAME.ids. Raises InvalidRelease."""
    path = folder / f"{table.name}.ids"
    check_size(path, table.ids_bytes, f"{table.rows} ids take")
    return np.asarray(np.memmap(path, "<i8", "r", shape=(table.rows,)))


def _as_bytes(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(ids).view(np.uint8).reshape(-1, ID_BYTES)
