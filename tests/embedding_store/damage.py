"""Damages a complete release behind the back of everything of ours: in a Redis with a plain client, in its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from embedding_store.backend import Backend
from embedding_store.buckets import bucket_bounds
from embedding_store.memmap import MemmapBackend
from embedding_store.redis_backend import RedisBackend
from embedding_store.redis_keys import page_key
from embedding_store.release import ReleaseManifest
from tests.embedding_store.bundles import TestTable

TABLES = (
    TestTable("item", "fp16", rows=9000, dim=16, hot=500),
    TestTable("raw", "fp32", rows=4000, dim=8, hot=20, sparse=True),
    TestTable("user", "fp32", rows=1300, dim=32, hot=10, default=True),
)
ITEM_PAGES = 38


class Piece(NamedTuple):
    """What is damaged at a time: a page or bucket, in files its rows or its ids."""

    table: str
    kind: str
    page: int


@dataclass
class Keys:
    """Of a release in a Redis."""

    backend: RedisBackend
    manifest: ReleaseManifest
    namespace: str

    def key(self, table: str, what: int | str) -> str:
        return page_key(self.backend.prefix, self.namespace, table, what)

    def page(self, table: str, page: int) -> bytes:
        return cast(bytes, self.backend.control.get(self.key(table, page)))

    def pieces(self, table: str) -> list[Piece]:
        return [Piece(table, "", page) for page in range(self.manifest.table(table).pages)]

    def read(self, piece: Piece) -> bytes:
        return self.page(piece.table, piece.page)

    def write(self, piece: Piece, content: bytes) -> None:
        self.backend.control.set(self.key(piece.table, piece.page), content)

    def lose(self, table: str, page: int) -> None:
        """This page and all behind it, as a file that is cut off does."""
        for number in range(page, self.manifest.table(table).pages):
            assert self.backend.control.delete(self.key(table, number)) == 1

    def cut(self, table: str, page: int) -> None:
        """Half of this page and all behind it."""
        half = self.page(table, page)[: len(self.page(table, page)) // 2 + 1]
        self.lose(table, page)
        self.backend.control.set(self.key(table, page), half)

    def change(self, table: str, page: int) -> None:
        content = bytearray(self.page(table, page))
        content[-1] ^= 1
        self.backend.control.set(self.key(table, page), bytes(content))

    def lose_hot(self, table: str) -> None:
        assert self.backend.control.delete(self.key(table, "hot")) == 1


@dataclass
class Files:
    """Of a release in a directory; pages that are lost, cut or changed are those of tables of dense ids."""

    folder: Path
    manifest: ReleaseManifest
    _bounds: dict[str, list[int]] = field(default_factory=dict)  # of the buckets of sparse tables

    def start(self, table: str, page: int) -> int:
        info = self.manifest.table(table)
        return min(page * info.page_rows, info.rows) * info.stored_bytes

    def pieces(self, table: str) -> list[Piece]:
        info = self.manifest.table(table)
        return [Piece(table, kind, page) for kind in ("pages", "ids")[: 1 + info.sparse] for page in range(info.pages)]

    def read(self, piece: Piece) -> bytes:
        path, start, end = self._where(piece)
        return path.read_bytes()[start:end]

    def write(self, piece: Piece, content: bytes) -> None:
        path, start, end = self._where(piece)
        assert len(content) == end - start
        with path.open("r+b") as file:
            file.seek(start)
            file.write(content)

    def _where(self, piece: Piece) -> tuple[Path, int, int]:
        """Its file, and where it begins and ends there."""
        info = self.manifest.table(piece.table)
        path, width = self.folder / f"{piece.table}.{piece.kind}", info.stored_bytes if piece.kind == "pages" else 8
        if not info.sparse:
            return path, self.start(piece.table, piece.page), self.start(piece.table, piece.page + 1)
        if piece.table not in self._bounds:  # before its ids are damaged
            ids = np.fromfile(self.folder / f"{piece.table}.ids", "<i8")
            self._bounds[piece.table] = bucket_bounds(ids, 0, info.pages, info.pages).tolist()
        bounds = self._bounds[piece.table]
        return path, bounds[piece.page] * width, bounds[piece.page + 1] * width

    def lose(self, table: str, page: int) -> None:
        self._cut(table, self.start(table, page))

    def cut(self, table: str, page: int) -> None:
        self._cut(table, (self.start(table, page) + self.start(table, page + 1)) // 2 + 1)

    def change(self, table: str, page: int) -> None:
        with (self.folder / f"{table}.pages").open("r+b") as file:
            file.seek(self.start(table, page + 1) - 1)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))

    def lose_hot(self, table: str) -> None:
        (self.folder / f"{table}.hot").unlink()

    def _cut(self, table: str, size: int) -> None:
        with (self.folder / f"{table}.pages").open("r+b") as file:
            file.truncate(size)


def damager(backend: Backend, release: str) -> Keys | Files:
    if isinstance(backend, RedisBackend):
        record = backend._record(release)
        return Keys(backend, record.manifest, record.namespace)
    assert isinstance(backend, MemmapBackend)
    return Files(backend._release_folder(release) / "tables", backend.manifest(release))
