"""Publishing into a directory: a folder beside the releases, which one rename makes a release."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from embedding_store.backend import ReleaseWriter, Verified, namespace
from embedding_store.byte_sizes import format_size
from embedding_store.durable import replace_file, sync_folder
from embedding_store.errors import ReleaseConflict, StoreNotReady
from embedding_store.file_locks import owns_folder
from embedding_store.memmap_pages import MemmapPages
from embedding_store.release import ReleaseManifest, TableInfo

if TYPE_CHECKING:
    from embedding_store.memmap import MemmapBackend


class MemmapWriter(MemmapPages, ReleaseWriter):
    """Holds a lock on its folder, which lasts as long as this process at most."""

    def __init__(self, backend: MemmapBackend, folder: Path, manifest: ReleaseManifest) -> None:
        self._manifest = manifest
        self._target = folder / "releases" / manifest.name
        self._folder = writing_folder(folder, manifest)
        super().__init__(backend, self._folder / "tables")
        with backend.guard():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            (self._folder / "tables").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not self._waited_for_lock():
                raise ReleaseConflict(f"{backend.address}: another publisher is writing {manifest.name} at this moment")
            with backend.guard():
                replace_file(self._folder / "manifest.json", msgspec.json.encode(manifest))
        except BaseException:
            os.close(self._lock)
            raise

    def _waited_for_lock(self) -> bool:
        """Who lists the store holds the lock too, for an instant."""
        for _ in range(20):
            if owns_folder(self._lock, self._folder):
                return True
            time.sleep(0.02)
        return False

    def mark_verified(self, table: TableInfo, verified: Verified) -> None:
        self.sync(table)
        with self._backend.guard():
            replace_file(self._path(table, "verified"), msgspec.json.encode(verified))

    def verified(self) -> dict[str, Verified]:
        with self._backend.guard():
            return {
                path.name.removesuffix(".verified"): msgspec.json.decode(path.read_bytes(), type=Verified)
                for path in (self._folder / "tables").glob("*.verified")
            }

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
                if not self._backend.contains(self._manifest):
                    raise StoreNotReady(
                        f"{self._backend.address}: {self._target} is in the way, and no release: it has no "
                        "manifest.json; remove it, then publish again"
                    ) from error
                shutil.rmtree(self._folder)  # the same release was committed meanwhile; this copy is our own
            sync_folder(self._target.parent)

    def close(self) -> None:
        os.close(self._lock)


def writing_folder(store: Path, manifest: ReleaseManifest) -> Path:
    return store / "writing" / f"{manifest.name}.{namespace(manifest)}"


def check_directory(address: str, store: Path, manifest: ReleaseManifest, room: int | None) -> None:
    """See `Backend.preflight`. The directory is there: `Backend.create` has made it."""
    for folder in (store, store / "releases", store / "writing", store / "active"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise StoreNotReady(
                f"{address}: this user (uid {os.geteuid()}) may not write into {folder}: give it write permission, and "
                "see that the file system is not mounted read-only"
            )
    if room is None:
        needed = sum(table.bytes + table.ids_bytes + 8 * table.hot_ids for table in manifest.tables)
        room = needed - sum(path.stat().st_size for path in (writing_folder(store, manifest) / "tables").glob("*"))
    system = os.statvfs(store)
    free = system.f_bavail * system.f_frsize
    if room > free:
        raise StoreNotReady(
            f"{address} has no room for {manifest.name}: it takes {format_size(room)} more, and "
            f"{format_size(free)} are free on that file system; free some, or remove old releases: torchrank gc"
        )
