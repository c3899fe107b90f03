"""One Redis server: its connections, its circuit breaker, and what was asked of it."""

from __future__ import annotations

import bisect
import os
import ssl
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import hiredis
import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import FETCH_BUCKETS, NodeStats
from embedding_store.breaker import FAILURES, Breaker
from embedding_store.errors import ProtocolError, StoreUnavailable
from embedding_store.redis_connection import ConnectionRefusedByNode, RedisConnection, Refusals, open_connection
from embedding_store.redis_fetch import PageFetch
from embedding_store.redis_url import RedisAddress
from embedding_store.redis_wire import WAITING
from embedding_store.talks import Talk, pause

T = TypeVar("T")
Exchange = Callable[[RedisConnection], Talk[T]]

_BUSY_PAUSE = 0.001  # seconds between looks whether a connection has become free
_FAIR_WAIT = 0.005  # seconds: that nothing came in less time says something of the caller, not of the server
_NOT_SERVING = ("LOADING", "MASTERDOWN")  # error replies of a server that has no data, or none that it may show


class _BusyError(TimeoutError):
    """All connections were in use until the limit: that is no failure of the server."""


class _SlowError(TimeoutError):
    """A part of the answer came: the server is at work, and it is the caller who wanted much in little time."""


class RedisNode:
    """Thread-safe."""

    def __init__(self, address: RedisAddress, tls: ssl.SSLContext | None) -> None:
        """tls: see `redis_connection.tls_context`."""
        self.address = address
        self.breaker = Breaker()
        self._tls = tls
        self._idle: list[RedisConnection] = []
        self._in_use = 0
        self._closed = False
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._fetches = self._failures = 0
        self._seconds = 0.0
        self._buckets = [0] * (len(FETCH_BUCKETS) + 1)

    def __str__(self) -> str:
        return str(self.address)

    def ask(
        self, fetch: PageFetch, commands: NDArray[np.int64], limit: float, *, asking: bool = False
    ) -> Talk[Refusals]:
        """Rows of these commands, int64 [m], WAITING, come into `fetch`; returned are the error replies to others.

        Raises StoreUnavailable: not reachable, too slow, or its breaker is open. What came before stays.
        """

        tried = False

        def exchange(connection: RedisConnection) -> Talk[Refusals]:
            nonlocal tried
            left = fetch.having(commands, WAITING) if tried else commands
            tried = True
            return connection.ask(fetch, left, limit, asking)

        limit = self._admitted(limit)
        began = time.monotonic()
        try:
            refusals = yield from self._guarded(exchange, limit)
        except StoreUnavailable:
            self._count(time.monotonic() - began, failed=True)
            raise
        self._count(time.monotonic() - began, failed=False)
        return refusals

    def request(self, command: tuple[str, ...], limit: float, *, asking: bool = False) -> Talk[object]:
        """As `RedisConnection.request`; raises StoreUnavailable. asking: ASKING before it."""

        def exchange(connection: RedisConnection) -> Talk[object]:
            if asking:
                yield from connection.request(("ASKING",), limit)
            return (yield from connection.request(command, limit))

        limit = self._admitted(limit)
        return (yield from self._guarded(exchange, limit))

    def stats(self) -> NodeStats:
        with self._lock:
            return NodeStats(
                str(self), self.breaker.open, self._fetches, self._failures, self._seconds, tuple(self._buckets)
            )

    def close(self) -> None:
        self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _admitted(self, limit: float) -> float:
        """Until when the caller may ask. Raises StoreUnavailable: not at all."""
        now = time.monotonic()
        if limit <= now:
            raise StoreUnavailable(f"no time was left to ask {self}")
        allowance = self.breaker.allowance()
        if not allowance:
            raise StoreUnavailable(f"{self.breaker.reason}; not asked now, after {FAILURES} failures in a row")
        return min(limit, now + allowance)

    def _guarded(self, exchange: Exchange[T], limit: float) -> Talk[T]:
        """The exchange; tells the breaker how it went, and the caller what went wrong."""
        now = time.monotonic()
        try:
            result = yield from self._on_a_connection(exchange, limit)
        except _BusyError as error:
            self.breaker.undecided()
            busy = f"all {self.address.connections} connections to {self} were in use for {limit - now:.2g} s"
            raise StoreUnavailable(busy) from error
        except ConnectionRefusedByNode as error:
            raise self._failed(f"{self} refused the connection: {error}") from error
        except _SlowError as error:
            self.breaker.succeeded()
            raise StoreUnavailable(f"{self} did not answer in full within {limit - now:.2g} s") from error
        except TimeoutError as error:
            waited = min(limit, time.monotonic()) - now  # less where it was the time for connecting that ran out
            silent = f"{self} did not answer within {waited:.2g} s"
            if waited < _FAIR_WAIT:
                self.breaker.undecided()
                raise StoreUnavailable(silent) from error
            raise self._failed(silent) from error
        except ProtocolError as error:
            raise self._failed(f"{self} answered what is no reply to the question: {error}") from error
        except (OSError, hiredis.HiredisError) as error:
            raise self._failed(f"{self} cannot be reached: {getattr(error, 'strerror', None) or error}") from error
        refusal = _not_serving(result)
        if refusal:
            raise self._failed(f"{self} answered: {refusal}")
        self.breaker.succeeded()
        return result

    def _failed(self, reason: str) -> StoreUnavailable:
        self.breaker.failed(reason)
        return StoreUnavailable(reason)

    def _on_a_connection(self, exchange: Exchange[T], limit: float) -> Talk[T]:
        while not self._reserve():
            try:
                yield from pause(_BUSY_PAUSE, limit)
            except TimeoutError as error:
                raise _BusyError from error
        try:
            connection = self._take_idle()
            if connection is not None:
                try:
                    return (yield from self._exchange(connection, exchange))
                except (ConnectionResetError, BrokenPipeError):
                    if connection.heard:
                        raise
                    self._close_idle()  # closed while idle, as when the server was restarted: a new connection tells
            opening = min(limit, time.monotonic() + self.address.connect_timeout)
            connection = yield from open_connection(self.address, self._tls, opening)
            return (yield from self._exchange(connection, exchange))
        finally:
            with self._lock:
                self._in_use -= 1

    def _exchange(self, connection: RedisConnection, exchange: Exchange[T]) -> Talk[T]:
        try:
            result = yield from exchange(connection)
        except BaseException as error:
            connection.close()  # replies may still be under way: this connection cannot be used again
            if isinstance(error, TimeoutError) and connection.heard:
                raise _SlowError from error
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return result
        connection.close()
        return result

    def _reserve(self) -> bool:
        """Whether one more connection may be used now."""
        with self._lock:
            if self._process != os.getpid():  # after a fork these sockets are the parent's
                self._process, self._idle, self._in_use = os.getpid(), [], 0
            free = self._in_use < self.address.connections
            self._in_use += free
            return free

    def _take_idle(self) -> RedisConnection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _count(self, seconds: float, *, failed: bool) -> None:
        with self._lock:
            self._fetches += 1
            self._failures += failed
            self._seconds += seconds
            self._buckets[bisect.bisect_left(FETCH_BUCKETS, seconds)] += 1


def _not_serving(result: object) -> str | None:
    refusals = result if isinstance(result, dict) else [str(result)] if isinstance(result, Exception) else []
    return next((line for line in refusals if line.startswith(_NOT_SERVING)), None)
