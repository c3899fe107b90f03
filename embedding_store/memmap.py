"""Releases in a directory: the embedded store that needs no server, and shares its pages with every process of a host.

releases/MODEL@VERSION/         manifest.json, tables/NAME.pages, .ids (sparse) and .hot; appears by one rename
writing/MODEL@VERSION.CONTENT   the same while it is being written; NAME.verified says how far a table is
active/MODEL.json               the history of activations, replaced by rename under active/MODEL.lock
since/MODEL@VERSION             when it last ceased to be the active one, as the file's time
pins/OWNER.json, OWNER.lock     which releases a sidecar serves: `memmap_pins.py`
removing/…, removed/…           what gc has taken out, and the CONTENT of all that it ever took out
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import (
    Backend,
    History,
    ReleaseWriter,
    Stored,
    check_current,
    conflict,
    hot_list,
    moved,
    namespace,
)
from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.codec import check_name
from embedding_store.durable import replace_file
from embedding_store.errors import InvalidRelease, StoreNotReady, StoreUnavailable, UnknownRelease
from embedding_store.file_locks import locked
from embedding_store.memmap_gc import MemmapShelf
from embedding_store.memmap_pages import MemmapPages
from embedding_store.memmap_pins import MemmapPins
from embedding_store.memmap_read import MappedTables
from embedding_store.memmap_writer import MemmapWriter, check_directory
from embedding_store.page_store import PageStore
from embedding_store.release import ReleaseManifest, decode_manifest

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MemmapBackend(Backend):
    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._maps: dict[str, MappedTables] = {}
        self._manifests: dict[str, ReleaseManifest] = {}
        self._lock = threading.Lock()
        self._pins = MemmapPins(self._folder / "pins")
        self._shelf = MemmapShelf(self, self._folder, self._pins)

    @property
    def address(self) -> str:
        return f"memmap://{self._folder}"

    @property
    def waits(self) -> bool:
        return False

    def releases(self) -> dict[str, ReleaseManifest]:
        found = {}
        for name in self.names("releases"):
            with suppress(UnknownRelease):  # gc has just taken it out
                found[name] = self._load_manifest(name)
        return found

    def inventory(self) -> list[Stored]:
        return self._shelf.inventory()

    def manifest(self, release: str, *, timeout: float | None = None) -> ReleaseManifest:
        known = self._manifests.get(release)
        return self._read_manifest(release) if known is None else known

    def _read_manifest(self, release: str) -> ReleaseManifest:
        manifest = self._load_manifest(release)
        check_current(self.address, manifest)
        self._manifests[release] = manifest
        return manifest

    def _load_manifest(self, release: str) -> ReleaseManifest:
        path = self._release_folder(release) / "manifest.json"
        try:
            return decode_manifest(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_reachable()
            names = ", ".join(self.names("releases")) or "none"
            raise UnknownRelease(f"no release {release!r} in {self.address}; it has: {names}") from error
        except OSError as error:
            raise StoreUnavailable(f"{self.address}: cannot read {path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise InvalidRelease(f"{path}: {error}") from error

    def contains(self, manifest: ReleaseManifest) -> bool:
        content = namespace(manifest)
        try:
            found = namespace(self._load_manifest(manifest.name))
        except UnknownRelease:
            if self._removed(manifest.name) not in (content, None):
                raise conflict(self.address, manifest.name, removed=True) from None
            return False
        if found != content:
            raise conflict(self.address, manifest.name)
        return True

    def histories(self) -> dict[str, History]:
        models = [name.removesuffix(".json") for name in self.names("active") if name.endswith(".json")]
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
        with self.guard(), self.locked_pointer(model):
            current = self.history(model)
            if current not in (expected, history):
                raise moved(self.address, model, expected, current)
            if history:
                self._read_manifest(history[-1])  # raises where gc has removed it
            if current[-1:] != history[-1:] and current:
                self._shelf.left(current[-1])
            replace_file(path, msgspec.json.encode(history))

    @contextmanager
    def locked_pointer(self, model: str) -> Iterator[None]:
        """Inside `guard`."""
        path = self._pointer(model).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            yield

    def fetch(self, release: str, batch: IdBatch, *, timeout: float | None = None) -> FetchedRows:
        """`timeout` has no effect: reading mapped memory cannot be interrupted."""
        return self._mapped(release).fetch(batch)

    def hot_ids(self, release: str, table: str) -> NDArray[np.int64]:
        info = self.manifest(release).table(table)
        if not info.hot_ids:
            return np.empty(0, np.int64)
        path = self._release_folder(release) / "tables" / f"{table}.hot"
        content = None
        with self.guard():
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                self._check_reachable()
        return hot_list(self.address, release, info, content)

    def create(self) -> None:
        with self.guard():
            self._folder.mkdir(parents=True, exist_ok=True)

    def preflight(self, manifest: ReleaseManifest, *, room: int | None = None) -> None:
        with self.guard():
            check_directory(self.address, self._folder, manifest, room)

    def writer(self, manifest: ReleaseManifest) -> ReleaseWriter:
        self.create()
        self.contains(manifest)
        return MemmapWriter(self, self._folder, manifest)

    def pages(self, release: str) -> PageStore:
        self._read_manifest(release)
        return MemmapPages(self, self._release_folder(release) / "tables")

    def pin(self, owner: str, releases: Collection[str], seconds: float) -> frozenset[str]:
        check_name("owner", owner)
        self._check_reachable()
        with self.guard(), self._pins.frozen():
            self._pins.set(owner, releases, seconds)
            return frozenset(releases) & frozenset(self.names("releases"))

    def pins(self) -> dict[str, list[str]]:
        with self.guard():
            return self._pins.by_release()

    def take_out(self, stored: Stored) -> None:
        self._shelf.take_out(stored)
        self.forget(stored.release)

    def erase(self, stored: Stored) -> Iterator[int]:
        return self._shelf.erase(stored)

    def forget(self, release: str) -> None:
        with self._lock:
            self._maps.pop(release, None)
        self._manifests.pop(release, None)

    def close(self) -> None:
        self._pins.close()
        with self._lock:
            self._maps.clear()  # unmapped when the last look-up that still reads one returns

    def _mapped(self, release: str) -> MappedTables:
        known = self._maps.get(release)
        if known is not None:
            return known
        tables = MappedTables(self.manifest(release), self._release_folder(release) / "tables")
        with self._lock:
            return self._maps.setdefault(release, tables)

    def names(self, kind: str) -> list[str]:
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

    def _removed(self, release: str) -> str | None:
        """CONTENT of a release that gc has removed."""
        path = self._folder / "removed" / release
        with self.guard():
            return path.read_text() if path.exists() else None

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
        """Turns what the file system reports into StoreUnavailable, and what can be mended into StoreNotReady."""
        try:
            yield
        except StoreUnavailable:
            raise
        except OSError as error:
            message = f"{self.address}: {error.filename or self._folder}: {error.strerror}"
            if error.errno in _FULL:
                advice = "free some room, or remove old releases (torchrank gc); publishing again goes on from here"
                raise StoreNotReady(f"{message}: {advice}") from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StoreNotReady(f"{message}: this user (uid {os.geteuid()}) may not write there") from error
            raise StoreUnavailable(message) from error
