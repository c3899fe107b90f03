"""Releases in a directory: the embedded store that needs no server, and shares its pages with every process of a host.

releases/MODEL@VERSION/         manifest.json, tables/NAME.pages, tables/NAME.hot; appears by one rename
writing/MODEL@VERSION.NAMESPACE the same while it is being written; NAME.verified marks a finished table
active/MODEL.json               the history of activations, replaced by rename under active/MODEL.lock
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import Backend, History, ReleaseWriter, Unfinished, conflict, moved, namespace
from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.codec import check_name
from embedding_store.durable import replace_file
from embedding_store.errors import InvalidRelease, StoreUnavailable, UnknownRelease
from embedding_store.memmap_read import MappedTables
from embedding_store.memmap_writer import MemmapWriter
from embedding_store.release import ReleaseManifest


class MemmapBackend(Backend):
    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._maps: dict[str, MappedTables] = {}
        self._manifests: dict[str, ReleaseManifest] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"memmap://{self._folder}"

    @property
    def waits(self) -> bool:
        return False

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
                replace_file(path, msgspec.json.encode(history))

    def fetch(self, release: str, batch: IdBatch, *, timeout: float | None = None) -> FetchedRows:
        """`timeout` has no effect: reading mapped memory cannot be interrupted."""
        return self._mapped(release).fetch(batch)

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

    def _mapped(self, release: str) -> MappedTables:
        known = self._maps.get(release)
        if known is not None:
            return known
        tables = MappedTables(self.manifest(release), self._release_folder(release) / "tables")
        with self._lock:
            return self._maps.setdefault(release, tables)

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
