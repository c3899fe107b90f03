"""Publishing into a directory: a folder beside the releases, which one rename makes a release."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import ReleaseWriter, namespace
from embedding_store.buckets import ID_BYTES
from embedding_store.durable import replace_file, sync_folder
from embedding_store.errors import InvalidRelease, ReleaseConflict
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.sparse_pages import BucketRun

if TYPE_CHECKING:
    from embedding_store.memmap import MemmapBackend


class MemmapWriter(ReleaseWriter):
    def __init__(self, backend: MemmapBackend, folder: Path, manifest: ReleaseManifest) -> None:
        self._backend = backend
        self._manifest = manifest
        self._target = folder / "releases" / manifest.name
        self._folder = folder / "writing" / f"{manifest.name}.{namespace(manifest)}"
        with backend.guard():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            (self._folder / "tables").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        if not self._owns_folder():
            os.close(self._lock)
            raise ReleaseConflict(f"{backend.address}: another publisher is writing {manifest.name} at this moment")

    def _owns_folder(self) -> bool:
        """Takes the lock, which lasts as long as this process at most, and looks that no rename came before it."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._lock), os.stat(self._folder))
        except (BlockingIOError, FileNotFoundError):
            return False

    def write(self, table: TableInfo, first_page: int, data: memoryview) -> None:
        self._write_at(self._path(table, "pages"), first_page * table.page_rows * table.row_bytes, data)

    def read(self, table: TableInfo, first_page: int, pages: int) -> bytes:
        page_bytes = table.page_rows * table.row_bytes
        return self._read_at(self._path(table, "pages"), first_page * page_bytes, pages * page_bytes)

    def write_buckets(self, table: TableInfo, run: BucketRun) -> None:
        self._write_at(self._path(table, "ids"), run.first_row * ID_BYTES, run.ids.view(np.uint8).data)
        self._write_at(self._path(table, "pages"), run.first_row * table.row_bytes, run.rows.reshape(-1).data)

    def read_buckets(self, table: TableInfo, run: BucketRun) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        rows = len(run.ids)
        ids = self._read_at(self._path(table, "ids"), run.first_row * ID_BYTES, rows * ID_BYTES)
        pages = self._read_at(self._path(table, "pages"), run.first_row * table.row_bytes, rows * table.row_bytes)
        if (len(ids), len(pages)) != (rows * ID_BYTES, rows * table.row_bytes):
            raise InvalidRelease(f"{self._folder} has lost the end of table {table.name!r}")
        return np.frombuffer(ids, "<i8"), np.frombuffer(pages, np.uint8).reshape(rows, table.row_bytes)

    def _write_at(self, path: Path, start: int, data: memoryview) -> None:
        with self._backend.guard():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(handle, data[written:], start + written)
            finally:
                os.close(handle)

    def _read_at(self, path: Path, start: int, size: int) -> bytes:
        with self._backend.guard(), path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def write_hot(self, table: TableInfo, ids: bytes) -> None:
        with self._backend.guard():
            replace_file(self._path(table, "hot"), ids)

    def read_hot(self, table: TableInfo) -> bytes:
        with self._backend.guard():
            return self._path(table, "hot").read_bytes()

    def mark_verified(self, table: TableInfo) -> None:
        with self._backend.guard():
            for kind in ("pages", "ids") if table.sparse else ("pages",):
                with self._path(table, kind).open("rb") as file:
                    os.fsync(file.fileno())
            replace_file(self._path(table, "verified"), b"")

    def verified(self) -> frozenset[str]:
        with self._backend.guard():
            names = os.listdir(self._folder / "tables")
        return frozenset(name.removesuffix(".verified") for name in names if name.endswith(".verified"))

    def commit(self) -> None:
        with self._backend.guard():
            replace_file(self._folder / "manifest.json", msgspec.json.encode(self._manifest))
            for marker in (self._folder / "tables").glob("*.verified"):
                marker.unlink()
            sync_folder(self._folder / "tables")
            try:
                self._folder.rename(self._target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self._backend.contains(self._manifest)
                shutil.rmtree(self._folder)  # the same release was committed meanwhile; this copy is our own
            sync_folder(self._target.parent)

    def close(self) -> None:
        os.close(self._lock)

    def _path(self, table: TableInfo, kind: str) -> Path:
        return self._folder / "tables" / f"{table.name}.{kind}"
