"""One connection from a client to a sidecar: blocking, one exchange at a time, every wait bounded by a deadline.

Deadlines are readings of time.monotonic().
"""

from __future__ import annotations

import os
import socket
import time

import numpy as np
from numpy.typing import NDArray

from embedding_store.client_address import Address
from embedding_store.client_calls import Exchange, Parts
from embedding_store.client_reply import ReplyReader


class Connection:
    """Raises OSError (TimeoutError, ConnectionError …) from every call; who uses it says what that means.

    usable: whether the last exchange came to its end, be it an error reply. A late answer would be taken for the next.
    process: the one that opened it, by id.
    """

    def __init__(self, address: Address, deadline: float) -> None:
        self.usable = False
        self.process = os.getpid()
        if address.path:
            self._socket = socket.socket(socket.AF_UNIX)
        else:
            self._socket = socket.create_connection((address.host, address.port), _left(deadline))
        try:
            self._limit(deadline)
            if address.path:
                self._socket.connect(address.path)
            else:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls is not None:
                self._socket = address.tls.wrap_socket(self._socket, server_hostname=address.host)
        except BaseException:
            self._socket.close()
            raise
        self._tls = address.tls is not None

    def close(self) -> None:
        self.usable = False
        self._socket.close()

    def exchange(self, exchange: Exchange, deadline: float) -> NDArray[np.uint8]:
        """The reply's content, uint8 [n]. Raises ErrorReplyError and ProtocolError, too."""
        self.usable = False
        try:
            self._send(exchange.request(_left(deadline)), deadline)
        except ConnectionError:  # a sidecar that turns a connection away says why before it closes
            reply = ReplyReader(exchange.length)
            if not self._receive(reply, deadline):
                raise
            return reply.content()
        reply = ReplyReader(exchange.length)
        if exchange.meanwhile is not None:
            exchange.meanwhile(reply.reserved)
        if not self._receive(reply, deadline):
            raise ConnectionResetError("the sidecar closed the connection")
        self.usable = True
        return reply.content()

    def _receive(self, reply: ReplyReader, deadline: float) -> bool:
        """False where the connection ends before the reply does."""
        while True:
            self._limit(deadline)
            received = self._socket.recv_into(reply.buffer())
            if not received:
                return False
            if reply.received(received):
                return True

    def _send(self, parts: Parts, deadline: float) -> None:
        self._limit(deadline)
        if self._tls:
            self._send_tls(b"".join(parts))  # it has no sendmsg
            return
        sent = self._socket.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._limit(deadline)
                self._socket.sendall(memoryview(part)[sent:])
            sent = max(0, sent - len(part))

    def _send_tls(self, request: bytes) -> None:
        import ssl  # loaded before: the socket is one of its

        try:
            self._socket.sendall(request)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:  # no ConnectionError, as any other socket raises
            raise ConnectionResetError("the sidecar closed the connection") from error

    def _limit(self, deadline: float) -> None:
        self._socket.settimeout(_left(deadline))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
