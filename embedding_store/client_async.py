"""AsyncSidecarClient: the look-ups of `client.SidecarClient` for programs that run in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedding_store.client_address import parse_address
from embedding_store.client_async_connection import AsyncConnection, connect
from embedding_store.client_calls import Call, Exchange, SidecarCalls, simple
from embedding_store.client_failures import Failure, explained
from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import LookupReply
from embedding_store.release import ReleaseEntry, ReleaseManifest

_T = TypeVar("_T")


class AsyncSidecarClient:
    """For one event loop. Calls may run at the same time, up to `connections` of them; the others wait for their turn.

    address, timeout and errors are SidecarClient's. A call that is cancelled gives up its connection and harms nobody.
    """

    def __init__(
        self, address: str, *, password: str | None = None, connections: int = 8, timeout: float = 5.0
    ) -> None:
        """Does not connect yet. Raises InvalidStoreURL."""
        self._address = parse_address(address)
        self._password = password
        self._timeout = timeout
        self._calls = SidecarCalls()
        self._turns = asyncio.Semaphore(connections)
        self._idle: list[AsyncConnection] = []  # last in, first out: under little load the same few stay warm
        self._closed = False

    @property
    def address(self) -> str:
        return self._address.text

    async def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """Rows are views into the buffer that the reply was received in, one row per distinct id."""
        return await self._run(self._calls.lookup(release, ids), timeout)

    async def manifest(self, release: str | None = None, *, model: str | None = None) -> ReleaseManifest:
        return await self._run(self._calls.manifest(release, model))

    async def releases(self) -> list[ReleaseEntry]:
        """Every complete release of the sidecar's store. Raises StoreUnavailable."""
        return await self._run(self._calls.releases())

    async def info(self) -> dict[str, str]:
        """The sidecar's counters: the lines of INFO."""
        return await self._run(self._calls.info())

    async def ping(self) -> None:
        """Raises StoreUnavailable where no sidecar answers."""
        await self._run(self._calls.ping())

    async def close(self) -> None:
        """Closes idle connections; one that is in use closes when its call returns."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Call[_T], timeout: float | None = None) -> _T:
        seconds = self._timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            exchange = next(call)
            while True:
                async with asyncio.timeout_at(deadline), self._turns:
                    content = await self._exchange(exchange, deadline)
                exchange = call.send(content)
        except StopIteration as returned:
            result: _T = returned.value
            return result
        except StoreUnavailable:
            raise  # of this client itself
        except Failure as error:
            raise explained(error, self.address, seconds) from error

    async def _exchange(self, exchange: Exchange, deadline: float) -> NDArray[np.uint8]:
        """A kept connection may have died with an earlier sidecar: then once more on a new one, which is safe because
        nothing that this client asks changes anything."""
        if self._closed:
            raise StoreUnavailable(f"{self.address}: this client was closed")
        if self._idle:
            try:
                return await self._on(self._idle.pop(), exchange, deadline)
            except ConnectionError:
                pass
        connection = await connect(self._address)
        if self._password is not None:
            try:
                await connection.exchange(simple(b"AUTH", self._password.encode()), 0.0)
            except BaseException:
                connection.close()
                raise
        return await self._on(connection, exchange, deadline)

    async def _on(self, connection: AsyncConnection, exchange: Exchange, deadline: float) -> NDArray[np.uint8]:
        try:
            return await connection.exchange(exchange, max(0.0, deadline - asyncio.get_running_loop().time()))
        finally:
            if connection.usable and not self._closed:
                self._idle.append(connection)
            else:
                connection.close()
