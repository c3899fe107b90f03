"""Who needs which release of a directory: one file per owner, and a lock that ends with the owner's process."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from embedding_store.durable import replace_file
from embedding_store.file_locks import is_locked, locked

_FORGOTTEN_AFTER = 86_400  # seconds


class Pin(msgspec.Struct, frozen=True):
    releases: list[str]
    until: float  # seconds since the epoch
    host: str

    def holds(self, locked: bool) -> bool:
        """Who has the lock lives. Who has not is dead, if that lock would be seen here; over NFS it may not."""
        return locked or (self.until > time.time() and self.host != socket.gethostname())


class MemmapPins:
    """pins/OWNER.json and pins/OWNER.lock, which the owner's process shares with nobody but itself. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locks: dict[str, int] = {}
        self._lock = threading.Lock()

    def set(self, owner: str, releases: Collection[str], seconds: float) -> None:
        """Call it inside `frozen`."""
        if not releases:
            (self._folder / f"{owner}.json").unlink(missing_ok=True)
            with self._lock:
                if owner in self._locks:
                    (self._folder / f"{owner}.lock").unlink(missing_ok=True)
                    os.close(self._locks.pop(owner))
            return
        with self._lock:
            if owner not in self._locks:
                self._locks[owner] = os.open(self._folder / f"{owner}.lock", os.O_RDONLY | os.O_CREAT, 0o644)
                fcntl.flock(self._locks[owner], fcntl.LOCK_SH)
        pin = Pin(sorted(releases), time.time() + seconds, socket.gethostname())
        replace_file(self._folder / f"{owner}.json", msgspec.json.encode(pin))

    def by_release(self) -> dict[str, list[str]]:
        owners: dict[str, list[str]] = {}
        for owner, pin in self._pins():
            if pin.holds(self._is_locked(owner)):
                for release in pin.releases:
                    owners.setdefault(release, []).append(owner)
        return owners

    def forget_old(self) -> None:
        """Removes the files of owners that are long dead. Call it inside `frozen`."""
        for owner, pin in self._pins():
            if not pin.holds(self._is_locked(owner)) and pin.until < time.time() - _FORGOTTEN_AFTER:
                (self._folder / f"{owner}.json").unlink(missing_ok=True)
                (self._folder / f"{owner}.lock").unlink(missing_ok=True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While one is inside, nobody else sets a pin or takes a release out."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with locked(self._folder / ".lock"):
            yield

    def close(self) -> None:
        """Pins end here."""
        with self._lock:
            for handle in self._locks.values():
                os.close(handle)
            self._locks.clear()

    def _pins(self) -> list[tuple[str, Pin]]:
        try:
            names = sorted(name for name in os.listdir(self._folder) if name.endswith(".json"))
        except FileNotFoundError:
            return []
        found = []
        for name in names:
            try:
                pin = msgspec.json.decode((self._folder / name).read_bytes(), type=Pin)
            except FileNotFoundError:
                continue  # its owner has just ended it
            found.append((name.removesuffix(".json"), pin))
        return found

    def _is_locked(self, owner: str) -> bool:
        return is_locked(self._folder / f"{owner}.lock")
