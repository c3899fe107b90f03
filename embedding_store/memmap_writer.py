"""Publishing into a directory: a folder beside the releases, which one rename makes a release."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from embedding_store.backend import ReleaseWriter, Verified, differs, namespace
from embedding_store.byte_sizes import format_size
from embedding_store.chunks import Chunk
from embedding_store.durable import replace_file, sync_folder
from embedding_store.errors import ReleaseConflict, StoreNotReady
from embedding_store.release import ReleaseManifest, TableInfo

if TYPE_CHECKING:
    from embedding_store.memmap import MemmapBackend


class MemmapWriter(ReleaseWriter):
    """Holds a lock on its folder, which lasts as long as this process at most."""

    def __init__(self, backend: MemmapBackend, folder: Path, manifest: ReleaseManifest) -> None:
        self._backend = backend
        self._manifest = manifest
        self._target = folder / "releases" / manifest.name
        self._folder = writing_folder(folder, manifest)
        with backend.guard():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            (self._folder / "tables").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        if not self._waited_for_lock():
            os.close(self._lock)
            raise ReleaseConflict(f"{backend.address}: another publisher is writing {manifest.name} at this moment")
        with backend.guard():
            replace_file(self._folder / "manifest.json", msgspec.json.encode(manifest))

    def _waited_for_lock(self) -> bool:
        """Who lists the store holds the lock too, for an instant."""
        for _ in range(20):
            if owns_folder(self._lock, self._folder):
                return True
            time.sleep(0.02)
        return False

    def write(self, table: TableInfo, chunk: Chunk) -> None:
        self._write(self._path(table, "pages"), chunk.first_row * table.row_bytes, chunk.rows.data.cast("B"))
        if table.sparse:
            self._write(self._path(table, "ids"), chunk.first_row * 8, chunk.ids.data.cast("B"))

    def _write(self, path: Path, start: int, content: memoryview) -> None:
        with self._backend.guard():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                written = 0
                while written < len(content):
                    written += os.pwrite(handle, content[written:], start + written)
            finally:
                os.close(handle)

    def verify(self, table: TableInfo, chunk: Chunk) -> None:
        parts = [("pages", chunk.first_row * table.row_bytes, chunk.rows.data.cast("B"))]
        if table.sparse:
            parts.append(("ids", chunk.first_row * 8, chunk.ids.data.cast("B")))
        for kind, start, expected in parts:
            with self._backend.guard(), self._path(table, kind).open("rb") as file:
                file.seek(start)
                stored = file.read(len(expected))
            if stored != expected:
                raise differs(self._backend.address, table, f"the {len(expected)} bytes from {start} on")

    def write_hot(self, table: TableInfo, ids: bytes) -> None:
        with self._backend.guard():
            replace_file(self._path(table, "hot"), ids)

    def read_hot(self, table: TableInfo) -> bytes:
        with self._backend.guard():
            return self._path(table, "hot").read_bytes()

    def mark_verified(self, table: TableInfo, verified: Verified) -> None:
        with self._backend.guard():
            for kind in ("pages", "ids") if table.sparse else ("pages",):
                with self._path(table, kind).open("rb") as file:
                    os.fsync(file.fileno())
            replace_file(self._path(table, "verified"), msgspec.json.encode(verified))

    def verified(self) -> dict[str, Verified]:
        with self._backend.guard():
            return {
                path.name.removesuffix(".verified"): msgspec.json.decode(path.read_bytes(), type=Verified)
                for path in (self._folder / "tables").glob("*.verified")
            }

    def lost_pages(self, table: TableInfo) -> int:
        with self._backend.guard():
            whole = self._path(table, "pages").stat().st_size == table.bytes
            if table.sparse:
                whole = whole and self._path(table, "ids").stat().st_size == table.ids_bytes
        return 0 if whole else table.pages

    def renew(self) -> None:
        """Nothing runs out here: see the class."""

    def commit(self) -> None:
        self._backend.contains(self._manifest)  # raises where the name was taken meanwhile
        with self._backend.guard():
            replace_file(self._folder / "manifest.json", msgspec.json.encode(self._manifest))  # its time: `idle_since`
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


def writing_folder(store: Path, manifest: ReleaseManifest) -> Path:
    return store / "writing" / f"{manifest.name}.{namespace(manifest)}"


def owns_folder(handle: int, folder: Path) -> bool:
    """Takes the lock of a folder that is open as `handle`, and looks that no rename came before it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):
        return False


def check_directory(address: str, store: Path, manifest: ReleaseManifest) -> None:
    """See `Backend.preflight`. The directory is there: `Backend.create` has made it."""
    for folder in (store, store / "releases", store / "writing", store / "active"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise StoreNotReady(
                f"{address}: this user (uid {os.geteuid()}) may not write into {folder}: give it write permission, and "
                "see that the file system is not mounted read-only"
            )
    needed = sum(table.bytes + table.ids_bytes + 8 * table.hot_ids for table in manifest.tables)
    written = sum(path.stat().st_size for path in (writing_folder(store, manifest) / "tables").glob("*"))
    system = os.statvfs(store)
    free = system.f_bavail * system.f_frsize
    if needed - written > free:
        raise StoreNotReady(
            f"{address} has no room for {manifest.name}: it takes {format_size(needed - written)} more, and "
            f"{format_size(free)} are free on that file system; free some, or remove old releases: torchrank gc"
        )
