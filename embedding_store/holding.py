"""Pins the releases that a process reads, so that nobody removes them from the store meanwhile (`torchrank gc`)."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Collection

from embedding_store.backend import Backend
from embedding_store.closing import Closing
from embedding_store.errors import StoreError

_log = logging.getLogger(__name__)

PIN_SECONDS = 60.0  # a pin outlives a process that was killed by that much


def owner_name() -> str:
    """Of the pins of one process: its host and process id, for whoever wonders, and a part that nobody else has."""
    return f"{socket.gethostname()[:80]}.{os.getpid()}.{secrets.token_hex(4)}"


class Hold(Closing):
    """Keeps releases pinned by a thread of its own, until it is closed. Where that fails it says so once: reading
    needs no right to write."""

    def __init__(self, backend: Backend, releases: Collection[str], *, seconds: float = PIN_SECONDS) -> None:
        self._backend = backend
        self._releases = releases
        self._seconds = seconds
        self._owner = owner_name()
        self._failed = False
        self._closed = threading.Event()
        self._pin()
        self._thread = threading.Thread(target=self._keep, name="hold", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(StoreError):
            self._backend.pin(self._owner, (), self._seconds)

    def _keep(self) -> None:
        while not self._closed.wait(self._seconds / 3):
            self._pin()

    def _pin(self) -> None:
        try:
            self._backend.pin(self._owner, self._releases, self._seconds)
        except StoreError as error:
            if not self._failed:
                _log.warning("%s: not pinned, torchrank gc may remove it: %s", ", ".join(self._releases), error)
            self._failed = True
        else:
            self._failed = False
