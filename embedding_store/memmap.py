"""Releases in a directory: the embedded store that needs no server, and shares its pages with every process of a host.

releases/MODEL@VERSION/         manifest.json, tables/NAME.pages, tables/NAME.hot; appears by one rename
writing/MODEL@VERSION.NAMESPACE the same while it is being written; NAME.verified marks a finished table
active/MODEL.json               the history of activations, replaced by rename under active/MODEL.lock
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import Backend, Fetched, History, ReleaseWriter, Unfinished, conflict, moved, namespace
from embedding_store.codec import check_name
from embedding_store.errors import InvalidRelease, ReleaseConflict, StoreUnavailable, UnknownRelease
from embedding_store.gather import take_rows
from embedding_store.release import ReleaseManifest, TableInfo


def _sync_folder(folder: Path) -> None:
    """A rename is durable only when its directory is."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes) -> None:
    """Whoever reads `path` finds the old content or the new, also after a power cut."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


class MemmapBackend(Backend):
    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._maps: dict[tuple[str, str], NDArray[np.uint8]] = {}
        self._manifests: dict[str, ReleaseManifest] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"memmap://{self._folder}"

    def releases(self) -> dict[str, ReleaseManifest]:
        return {name: self.manifest(name) for name in self._names("releases") if "@" in name}

    def unfinished(self) -> list[Unfinished]:
        parts = [name.rpartition(".") for name in self._names("writing")]
        return [Unfinished(release, content) for release, _, content in parts]

    def manifest(self, release: str) -> ReleaseManifest:
        known = self._manifests.get(release)
        if known is not None:
            return known
        path = self._release_folder(release) / "manifest.json"
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=ReleaseManifest)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_reachable()
            names = ", ".join(self._names("releases")) or "none"
            raise UnknownRelease(f"no release {release!r} in {self.address}; it has: {names}") from error
        except OSError as error:
            raise StoreUnavailable(f"{self.address}: cannot read {path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise InvalidRelease(f"{path}: {error}") from error
        self._manifests[release] = manifest
        return manifest

    def contains(self, manifest: ReleaseManifest) -> bool:
        if not (self._release_folder(manifest.name) / "manifest.json").exists():
            return False  # the directory itself may be missing: the first publication makes it
        if namespace(self.manifest(manifest.name)) != namespace(manifest):
            raise conflict(self.address, manifest.name)
        return True

    def histories(self) -> dict[str, History]:
        models = [name.removesuffix(".json") for name in self._names("active") if name.endswith(".json")]
        return {model: self.history(model) for model in models}

    def history(self, model: str) -> History:
        path = self._pointer(model)
        try:
            return msgspec.json.decode(path.read_bytes(), type=History)
        except FileNotFoundError:
            self._check_reachable()
            return ()
        except OSError as error:
            raise StoreUnavailable(f"{self.address}: cannot read {path}: {error.strerror}") from error

    def set_history(self, model: str, expected: History, history: History) -> None:
        path = self._pointer(model)
        with self.guard():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also by kill -9
                current = self.history(model)
                if current not in (expected, history):
                    raise moved(self.address, model, expected, current)
                _replace(path, msgspec.json.encode(history))

    def fetch(self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None) -> Fetched:
        """`timeout` has no effect: reading mapped memory cannot be interrupted."""
        fetched: Fetched = {}
        for name, wanted in ids.items():
            pages = self._map(release, name)
            rows = np.empty((len(wanted), pages.shape[1]), np.uint8)
            found = np.empty(len(wanted), np.bool_)
            take_rows(pages, wanted, rows, found)
            fetched[name] = rows, found
        return fetched

    def hot_ids(self, release: str, table: str) -> NDArray[np.int64]:
        info = self.manifest(release).table(table)
        if not info.hot_ids:
            return np.empty(0, np.int64)
        path = self._release_folder(release) / "tables" / f"{table}.hot"
        with self.guard():
            return np.frombuffer(path.read_bytes(), "<i8").astype(np.int64)

    def writer(self, manifest: ReleaseManifest) -> ReleaseWriter:
        self.contains(manifest)
        return MemmapWriter(self, self._folder, manifest)

    def close(self) -> None:
        with self._lock:
            self._maps.clear()  # unmapped when the last look-up that still reads one returns

    def _map(self, release: str, table: str) -> NDArray[np.uint8]:
        """uint8 [rows, row_bytes], read only, backed by the pages file."""
        known = self._maps.get((release, table))
        if known is not None:
            return known
        info = self.manifest(release).table(table)
        path = self._release_folder(release) / "tables" / f"{table}.pages"
        with self.guard():
            size = path.stat().st_size
            if size != info.bytes:  # reading past the end of a mapped file would kill the process
                raise StoreUnavailable(f"{path} has {size} bytes; release {release} must have {info.bytes}: damaged")
            pages = np.memmap(path, np.uint8, "r", shape=(info.rows, info.row_bytes))
        with self._lock:
            return self._maps.setdefault((release, table), np.asarray(pages))

    def _names(self, kind: str) -> list[str]:
        try:
            return sorted(os.listdir(self._folder / kind))
        except FileNotFoundError:
            self._check_reachable()
            return []
        except OSError as error:
            raise StoreUnavailable(f"{self.address}: cannot list {kind}: {error.strerror}") from error

    def _check_reachable(self) -> None:
        if not self._folder.is_dir():
            raise StoreUnavailable(f"{self.address} cannot be reached: there is no such directory")

    def _release_folder(self, release: str) -> Path:
        model, at, version = release.partition("@")
        if not at:
            raise UnknownRelease(f"{release!r} is no release; a release is named MODEL@VERSION")
        try:
            return self._folder / "releases" / f"{check_name('model', model)}@{check_name('version', version)}"
        except InvalidRelease as error:
            raise UnknownRelease(f"no release {release!r} in {self.address}: {error}") from error

    def _pointer(self, model: str) -> Path:
        return self._folder / "active" / f"{check_name('model', model)}.json"

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turns what the file system reports into StoreUnavailable."""
        try:
            yield
        except OSError as error:
            if isinstance(error, StoreUnavailable):
                raise
            raise StoreUnavailable(f"{self.address}: {error.filename or ''}: {error.strerror}") from error


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
        with self._backend.guard():
            handle = os.open(self._path(table, "pages"), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                start = first_page * table.page_rows * table.row_bytes
                written = 0
                while written < len(data):
                    written += os.pwrite(handle, data[written:], start + written)
            finally:
                os.close(handle)

    def read(self, table: TableInfo, first_page: int, pages: int) -> bytes:
        page_bytes = table.page_rows * table.row_bytes
        with self._backend.guard(), self._path(table, "pages").open("rb") as file:
            file.seek(first_page * page_bytes)
            return file.read(pages * page_bytes)

    def write_hot(self, table: TableInfo, ids: bytes) -> None:
        with self._backend.guard():
            _replace(self._path(table, "hot"), ids)

    def read_hot(self, table: TableInfo) -> bytes:
        with self._backend.guard():
            return self._path(table, "hot").read_bytes()

    def mark_verified(self, table: TableInfo) -> None:
        with self._backend.guard():
            with self._path(table, "pages").open("rb") as file:
                os.fsync(file.fileno())
            _replace(self._path(table, "verified"), b"")

    def verified(self) -> frozenset[str]:
        with self._backend.guard():
            names = os.listdir(self._folder / "tables")
        return frozenset(name.removesuffix(".verified") for name in names if name.endswith(".verified"))

    def commit(self) -> None:
        with self._backend.guard():
            _replace(self._folder / "manifest.json", msgspec.json.encode(self._manifest))
            for marker in (self._folder / "tables").glob("*.verified"):
                marker.unlink()
            _sync_folder(self._folder / "tables")
            try:
                self._folder.rename(self._target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self._backend.contains(self._manifest)
                shutil.rmtree(self._folder)  # the same release was committed meanwhile; this copy is our own
            _sync_folder(self._target.parent)

    def close(self) -> None:
        os.close(self._lock)

    def _path(self, table: TableInfo, kind: str) -> Path:
        return self._folder / "tables" / f"{table.name}.{kind}"
