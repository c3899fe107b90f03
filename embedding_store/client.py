"""SidecarClient: an EmbeddingLookup whose store is in a sidecar, next door or on another host."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from embedding_store.client_address import parse_address
from embedding_store.client_calls import Call, Exchange, SidecarCalls, simple
from embedding_store.client_connection import Connection
from embedding_store.client_failures import Failure, explained
from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import EmbeddingLookup, LookupReply
from embedding_store.release import ReleaseEntry, ReleaseManifest

_T = TypeVar("_T")


class SidecarClient(EmbeddingLookup):
    """Thread-safe. Up to `connections` sockets, opened when needed, kept, and opened anew after a sidecar's restart.
    Of use on both sides of a fork, where no call is under way at that moment.

    address: `client_address.parse_address` says which there are. timeout: seconds, for calls that give none of their
    own. Whatever keeps the sidecar from answering in time is a StoreUnavailable that names the address.
    """

    def __init__(
        self, address: str, *, password: str | None = None, connections: int = 8, timeout: float = 5.0
    ) -> None:
        """Does not connect yet. Raises InvalidStoreURL."""
        self._address = parse_address(address)
        self._password = password
        self._timeout = timeout
        self._connections = connections
        self._calls = SidecarCalls()
        self._closed = False
        self._turns = threading.Semaphore(connections)
        self._idle: list[Connection] = []  # last in, first out: under little load the same few stay warm

    @property
    def address(self) -> str:
        return self._address.text

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """Rows are views into the buffer that the reply was received in, one row per distinct id."""
        return self._run(self._calls.lookup(release, ids), timeout)

    def manifest(self, release: str | None = None, *, model: str | None = None) -> ReleaseManifest:
        return self._run(self._calls.manifest(release, model))

    def releases(self) -> list[ReleaseEntry]:
        """Every complete release of the sidecar's store. Raises StoreUnavailable."""
        return self._run(self._calls.releases())

    def info(self) -> dict[str, str]:
        """The sidecar's counters: the lines of INFO."""
        return self._run(self._calls.info())

    def ping(self) -> None:
        """Raises StoreUnavailable where no sidecar answers."""
        self._run(self._calls.ping())

    def close(self) -> None:
        """Closes idle sockets; one that is in use closes when its call returns."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _run(self, call: Call[_T], timeout: float | None = None) -> _T:
        seconds = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        try:
            exchange = next(call)
            while True:
                exchange = call.send(self._exchange(exchange, deadline))
        except StopIteration as returned:
            result: _T = returned.value
            return result
        except StoreUnavailable:
            raise  # of this client itself
        except Failure as error:
            raise explained(error, self.address, seconds) from error

    def _exchange(self, exchange: Exchange, deadline: float) -> NDArray[np.uint8]:
        if self._closed:
            raise StoreUnavailable(f"{self.address}: this client was closed")
        wait = max(0.0, deadline - time.monotonic())
        if not self._turns.acquire(timeout=wait):
            raise StoreUnavailable(f"{self.address}: all {self._connections} connections were busy for {wait:.3f} s")
        try:
            return self._on_connection(exchange, deadline)
        finally:
            self._turns.release()

    def _on_connection(self, exchange: Exchange, deadline: float) -> NDArray[np.uint8]:
        """A kept connection may have died with an earlier sidecar: then once more on a new one, which is safe because
        nothing that this client asks changes anything."""
        kept = self._kept()
        if kept is None:
            return self._on(self._connect(deadline), exchange, deadline)
        try:
            return self._on(kept, exchange, deadline)
        except ConnectionError:
            return self._on(self._connect(deadline), exchange, deadline)

    def _kept(self) -> Connection | None:
        """After a fork the parent goes on with its sockets: two processes on one would read each other's replies."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.process == os.getpid():
                return connection
            connection.close()

    def _on(self, connection: Connection, exchange: Exchange, deadline: float) -> NDArray[np.uint8]:
        try:
            return connection.exchange(exchange, deadline)
        finally:
            if connection.usable and not self._closed:
                self._idle.append(connection)
            else:
                connection.close()

    def _connect(self, deadline: float) -> Connection:
        connection = Connection(self._address, deadline)
        if self._password is not None:
            try:
                connection.exchange(simple(b"AUTH", self._password.encode()), deadline)
            except BaseException:
                connection.close()
                raise
        return connection
