"""Readers pass while nobody rearranges what they read; nobody waits but the one who does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._closed = False

    def enter(self) -> bool:
        """False while it is closed; else `leave` has to follow."""
        with self._changed:
            self._inside += not self._closed
            return not self._closed

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            if self._closed and not self._inside:
                self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Waits for those who are inside, and lets nobody in. One thread at a time."""
        try:
            with self._changed:
                self._closed = True
                self._changed.wait_for(lambda: not self._inside)
            yield
        finally:
            with self._changed:
                self._closed = False
