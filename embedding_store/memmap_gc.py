"""What lies in a directory of releases, and its removal."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from embedding_store.backend import Stored, namespace
from embedding_store.durable import replace_file, sync_folder
from embedding_store.errors import ReleaseConflict
from embedding_store.file_locks import owns_folder
from embedding_store.release import ReleaseManifest, decode_manifest

if TYPE_CHECKING:
    from embedding_store.memmap import MemmapBackend
    from embedding_store.memmap_pins import MemmapPins


class MemmapShelf:
    def __init__(self, backend: MemmapBackend, folder: Path, pins: MemmapPins) -> None:
        self._backend = backend
        self._folder = folder
        self._pins = pins

    def inventory(self) -> list[Stored]:
        ready = [
            Stored(name, namespace(manifest), "ready", manifest, self._idle(name))
            for name, manifest in self._backend.releases().items()
        ]
        return ready + list(self._unfinished()) + list(self._removing())

    def take_out(self, stored: Stored) -> None:
        with self._backend.guard():
            for kind in ("removing", "removed"):
                (self._folder / kind).mkdir(exist_ok=True)
            if stored.state == "ready":
                self._take_out_release(stored)
            else:
                self._take_out_unfinished(stored)

    def erase(self, stored: Stored) -> Iterator[int]:
        """Files are unlinked, never truncated: who has one mapped reads on, and its room is free when that ends.
        What is not there any more, another gc has removed."""
        for folder in self._removing_folders(stored):
            for path in _files(folder / "tables"):
                with self._backend.guard():
                    path.unlink(missing_ok=True)
                yield 1
            with self._backend.guard():
                shutil.rmtree(folder, onerror=_unless_gone)

    def left(self, release: str) -> None:
        """Remembers that a release has ceased to be the active one at this moment."""
        (self._folder / "since").mkdir(exist_ok=True)
        replace_file(self._folder / "since" / release, b"")

    def _take_out_release(self, stored: Stored) -> None:
        assert stored.manifest is not None, "ready releases have one"
        source = self._folder / "releases" / stored.release
        with self._backend.locked_pointer(stored.manifest.model), self._pins.frozen():
            if not source.exists():
                if self._removing_folders(stored):
                    return
                raise self._refused(stored, "is not there any more")
            if self._backend.history(stored.manifest.model)[-1:] == (stored.release,):
                raise self._refused(stored, "has become active")
            owners = self._pins.by_release().get(stored.release)
            if owners:
                raise self._refused(stored, f"has been pinned by {', '.join(owners)}")
            replace_file(self._folder / "removed" / stored.release, stored.namespace.encode())
            self._move(source, stored)
            self._pins.forget_old()
        (self._folder / "since" / stored.release).unlink(missing_ok=True)

    def _take_out_unfinished(self, stored: Stored) -> None:
        source = self._folder / "writing" / f"{stored.release}.{stored.namespace}"
        try:
            handle = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if self._removing_folders(stored):
                return
            raise self._refused(stored, "is not there any more") from None
        try:
            if not owns_folder(handle, source):
                raise self._refused(stored, "is being published")
            self._move(source, stored)
        finally:
            os.close(handle)

    def _move(self, source: Path, stored: Stored) -> None:
        """The name is new each time: one that was published again may be removed again before the first has gone."""
        target = self._folder / "removing" / f"{stored.release}.{stored.namespace}-{secrets.token_hex(4)}"
        source.rename(target)
        sync_folder(target.parent)
        sync_folder(source.parent)

    def _refused(self, stored: Stored, why: str) -> ReleaseConflict:
        return ReleaseConflict(f"{self._backend.address}: {stored.release} {why}")

    def _removing_folders(self, stored: Stored) -> list[Path]:
        name = f"{stored.release}.{stored.namespace}"
        found = [entry for entry in self._backend.names("removing") if entry == name or entry.startswith(f"{name}-")]
        return [self._folder / "removing" / entry for entry in found]

    def _unfinished(self) -> Iterator[Stored]:
        for name in self._backend.names("writing"):
            release, _, content = name.rpartition(".")
            folder = self._folder / "writing" / name
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue  # has just been committed
            try:
                at_work = not owns_folder(handle, folder)
            finally:
                os.close(handle)
            yield Stored(release, content, "unfinished", _manifest(folder), _idle(_newest(folder)), at_work)

    def _removing(self) -> Iterator[Stored]:
        for name in self._backend.names("removing"):
            release, _, content = name.rpartition(".")
            yield Stored(release, content, "removing", _manifest(self._folder / "removing" / name), 0)

    def _idle(self, release: str) -> float:
        published = self._folder / "releases" / release / "manifest.json"
        return _idle(max(_changed(published), _changed(self._folder / "since" / release)))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _unless_gone(function: object, path: str, raised: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


def _manifest(folder: Path) -> ReleaseManifest | None:
    try:
        return decode_manifest((folder / "manifest.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _newest(folder: Path) -> float:
    return max(_changed(path) for path in [folder, folder / "tables", *_files(folder / "tables")])


def _idle(since: float) -> float:
    return max(0.0, time.time() - since)
