"""Talks over several sockets at once, in one thread, none of which blocks another.

A talk is a generator. It yields what it waits for (a file descriptor, events of `select.poll`, and the reading of
time.monotonic() until which) and is sent the events that came; 0: the time came first. `yield from` makes a talk out of
smaller ones, so that connecting, a TLS handshake and an exchange of commands read from top to bottom.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Generator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
Wait = tuple[int, int, float]
Talk = Generator[Wait, int, T]

_LONGEST_POLL = 3600.0  # seconds: poll takes no more milliseconds than a C int holds; who still waits is polled again
NOTHING = -1  # the descriptor of one who waits for the time only


def ready(descriptor: int, events: int, limit: float) -> Talk[int]:
    """Waits for one of the events and returns which came. Raises TimeoutError at the limit."""
    came = yield descriptor, events, limit
    if not came:
        raise TimeoutError
    return came


def run(talk: Talk[T]) -> T:
    """Its result; for a talk that is the only one of a call."""
    results: list[T] = []

    def keep() -> Talk[None]:
        results.append((yield from talk))

    talks = Talks()
    talks.start(keep())
    talks.run()
    return results[0]


def pause(seconds: float, limit: float) -> Talk[None]:
    """Raises TimeoutError where the pause would not end before the limit."""
    until = time.monotonic() + seconds
    if until >= limit:
        raise TimeoutError
    yield NOTHING, 0, until


class Talks:
    """Those of one call. A talk may start others; what one raises ends all of them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Talk[None], Wait]] = []

    def start(self, talk: Talk[None]) -> None:
        """Runs it up to where it first waits."""
        with suppress(StopIteration):
            self._waiting.append((talk, next(talk)))

    def run(self) -> None:
        """Returns when all have ended."""
        try:
            while self._waiting:
                self._step()
        finally:
            for talk, _ in self._waiting:
                talk.close()

    def _step(self) -> None:
        came = self._poll()
        now = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for number, (talk, wait) in enumerate(waiting):
            events = came.get(wait[0], 0) if wait[2] > now else 0
            if not events and wait[2] > now:
                self._waiting.append((talk, wait))
                continue
            try:
                self._waiting.append((talk, talk.send(events)))
            except StopIteration:
                pass
            except BaseException:
                self._waiting += waiting[number + 1 :]  # for `run` to close
                raise

    def _poll(self) -> dict[int, int]:
        """Events by descriptor."""
        poller = select.poll()
        first = math.inf
        for _, (descriptor, events, until) in self._waiting:
            first = min(first, until)
            if descriptor != NOTHING:
                poller.register(descriptor, events)
        seconds = min(first - time.monotonic(), _LONGEST_POLL)
        return dict(poller.poll(max(0, math.ceil(seconds * 1000))))
