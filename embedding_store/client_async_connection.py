"""One connection from an event loop to a sidecar: one exchange at a time. Who awaits it sets the time limit."""

from __future__ import annotations

import asyncio
from typing import cast

import numpy as np
from numpy.typing import NDArray

from embedding_store.client_address import Address
from embedding_store.client_calls import Exchange
from embedding_store.client_reply import ErrorReplyError, ReplyReader
from embedding_store.errors import ProtocolError


class AsyncConnection(asyncio.BufferedProtocol):
    """Raises OSError from `exchange`; who uses it says what that means.

    usable: whether the last exchange came to its end, be it an error reply. A late answer would be taken for the next.
    """

    def __init__(self) -> None:
        self.usable = False
        self._transport: asyncio.Transport
        self._reply = ReplyReader()  # at first for what a sidecar says unasked: why it turns a connection away
        self._answer: asyncio.Future[ReplyReader] | None = None
        self._end: Exception | None = None  # why nothing more can be asked

    async def exchange(self, exchange: Exchange, seconds: float) -> NDArray[np.uint8]:
        """The reply's content, uint8 [n]. seconds: what the sidecar is told that it has.

        Raises ErrorReplyError and ProtocolError, too.
        """
        self.usable = False
        if self._end is not None:
            raise self._end
        self._reply = ReplyReader(exchange.length)
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.writelines(exchange.request(seconds))
        if exchange.meanwhile is not None:
            exchange.meanwhile(self._reply.reserved)
        reply = await self._answer
        self.usable = self._end is None
        return reply.content()

    def close(self) -> None:
        self.usable = False
        self._transport.abort()  # nothing is left to be said

    # ---- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reply.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            whole = self._reply.received(nbytes)
        except ProtocolError as error:
            self._fail(error)
            self._transport.abort()
            return
        if not whole:
            return
        reply, self._reply = self._reply, ReplyReader()  # a loop may ask for a buffer again before it finds no more
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(reply)
        else:
            self._fail(_unasked(reply))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or ConnectionResetError("the sidecar closed the connection"))

    def _fail(self, error: Exception) -> None:
        self._end = self._end or error
        self.usable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._end)


def _unasked(reply: ReplyReader) -> Exception:
    try:
        return ProtocolError(f"the sidecar sent {reply.content().tobytes()[:40]!r} unasked")
    except ErrorReplyError as error:
        return error


async def connect(address: Address) -> AsyncConnection:
    loop = asyncio.get_running_loop()
    if address.path:
        _, connection = await loop.create_unix_connection(AsyncConnection, address.path)
    else:
        _, connection = await loop.create_connection(AsyncConnection, address.host, address.port, ssl=address.tls)
    return connection
