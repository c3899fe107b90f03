"""The pages of one release in a folder of files, which processes may have mapped.

So files are written in place. They are never replaced, which those processes would not notice, and lose no byte that a
mapping has. A file that was cut off gets its pages in their order: it has its size again, for which readers look, when
its last page is there and all before it are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedding_store.chunks import Chunk
from embedding_store.durable import replace_file, sync_folder
from embedding_store.page_store import CHANGED, LOST, PageStore, nothing
from embedding_store.release import TableInfo

if TYPE_CHECKING:
    from embedding_store.memmap import MemmapBackend


class _Part(NamedTuple):
    """What a chunk has of one file."""

    path: Path
    width: int  # bytes a row
    start: int  # in bytes
    content: memoryview
    whole: int  # bytes of the file


class MemmapPages(PageStore):
    def __init__(self, backend: MemmapBackend, folder: Path) -> None:
        """folder: that of the NAME.pages files."""
        self._backend = backend
        self._tables = folder

    @property
    def address(self) -> str:
        return self._backend.address

    def write(self, table: TableInfo, chunk: Chunk) -> None:
        for part in self._parts(table, chunk):
            with self._backend.guard():
                handle = os.open(part.path, os.O_WRONLY | os.O_CREAT, 0o644)
                try:
                    _write(handle, part)
                finally:
                    os.close(handle)

    def compare(self, table: TableInfo, chunk: Chunk) -> NDArray[np.uint8]:
        states = np.zeros(chunk.pages, np.uint8)  # SAME
        for part in self._parts(table, chunk):
            stored, too_long = self._read(part)
            if stored != part.content:
                states = np.maximum(states, _compare(stored, part.content, chunk.bounds[1:] * part.width))
            if too_long:
                states[-1] = max(states[-1], CHANGED)
        return states

    def write_hot(self, table: TableInfo, ids: bytes) -> None:
        """By a rename: nobody has these files mapped."""
        with self._backend.guard():
            replace_file(self._path(table, "hot"), ids)

    def read_hot(self, table: TableInfo) -> bytes | None:
        path = self._path(table, "hot")
        with self._backend.guard():
            return path.read_bytes() if path.exists() else None

    def lost_pages(self, table: TableInfo, meanwhile: Callable[[], None] = nothing) -> int:
        with self._backend.guard():
            sizes = [(_size(self._path(table, kind)), size) for kind, size in _sizes(table).items()]
        if all(found == size for found, size in sizes):
            return 0
        rows = min(table.rows * found // size for found, size in sizes)
        return max(1, table.pages - rows // table.page_rows)

    def sync(self, table: TableInfo) -> None:
        with self._backend.guard():
            for kind in _sizes(table):
                with self._path(table, kind).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(self._tables)

    def _parts(self, table: TableInfo, chunk: Chunk) -> list[_Part]:
        parts = [("pages", table.stored_bytes, chunk.rows.reshape(-1).data, table.bytes)]
        if table.sparse:
            parts.append(("ids", 8, chunk.ids.view(np.uint8).data, table.ids_bytes))
        return [
            _Part(self._path(table, kind), width, chunk.first_row * width, content, whole)
            for kind, width, content, whole in parts
        ]

    def _read(self, part: _Part) -> tuple[bytes, bool]:
        """As much of it as is there; and whether it is the file's end, and the file has more."""
        with self._backend.guard():
            if not part.path.exists():
                return b"", False
            with part.path.open("rb") as file:
                file.seek(part.start)
                stored = file.read(len(part.content))
                return stored, _is_end(part) and os.fstat(file.fileno()).st_size > part.whole

    def _path(self, table: TableInfo, kind: str) -> Path:
        return self._tables / f"{table.name}.{kind}"


def _compare(stored: bytes, content: memoryview, ends: NDArray[np.int64]) -> NDArray[np.uint8]:
    """States of the pages that end there, in bytes of `content`."""
    states = np.zeros(len(ends), np.uint8)  # SAME
    different = np.flatnonzero(np.frombuffer(stored, np.uint8) != np.frombuffer(content, np.uint8)[: len(stored)])
    states[np.searchsorted(ends, different, side="right")] = CHANGED
    states[ends > len(stored)] = LOST
    return states


def _write(handle: int, part: _Part) -> None:
    written = 0
    while written < len(part.content):
        written += os.pwrite(handle, part.content[written:], part.start + written)
    if _is_end(part) and os.fstat(handle).st_size > part.whole:
        os.ftruncate(handle, part.whole)  # what nobody has mapped


def _is_end(part: _Part) -> bool:
    return part.start + len(part.content) == part.whole


def _sizes(table: TableInfo) -> dict[str, int]:
    """Bytes of its files, by their kind."""
    return {"pages": table.bytes} | ({"ids": table.ids_bytes} if table.sparse else {})


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
