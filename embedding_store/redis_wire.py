"""The read path to Redis: GETRANGE commands written by a kernel, on a plain socket, read by hiredis, under a deadline.

redis-py packs a pipeline of 10,000 GETRANGE eight times slower than the server answers it, and has no deadline for a
whole pipeline; control and publishing go through it all the same (`redis_backend.py`).
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import hiredis
import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.errors import StoreUnavailable
from embedding_store.redis_url import RedisAddress

Batch = tuple[bytes | memoryview, int]  # commands, and how many they are

_RECEIVE_BYTES = 1 << 18
_MOST_DIGITS = 20
_FIXED = np.frombuffer(b"*4\r\n$8\r\nGETRANGE\r\n", np.uint8)


@njit(cache=True, nogil=True, inline="always")
def _digits(number: int) -> int:
    count = 1
    while number >= 10:
        number //= 10
        count += 1
    return count


@njit(cache=True, nogil=True)
def _put_number(buffer, at, number):  # type: ignore[no-untyped-def]
    """Decimal without leading zeros: Redis refuses padded offsets."""
    end = at + _digits(number)
    for place in range(end - 1, at - 1, -1):
        buffer[place] = 48 + number % 10
        number //= 10
    return end


@njit(cache=True, nogil=True)
def _put_end(buffer, at):  # type: ignore[no-untyped-def]
    buffer[at] = 13
    buffer[at + 1] = 10
    return at + 2


@njit(cache=True, nogil=True)
def _put_length(buffer, at, length):  # type: ignore[no-untyped-def]
    buffer[at] = 36  # $
    return _put_end(buffer, _put_number(buffer, at + 1, length))


@njit(cache=True, nogil=True)
def _put_argument(buffer, at, number):  # type: ignore[no-untyped-def]
    at = _put_length(buffer, at, _digits(number))
    return _put_end(buffer, _put_number(buffer, at, number))


@njit(cache=True, nogil=True)
def _encode(fixed, prefix, ids, page_rows, row_bytes, buffer):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(len(ids)):
        page = ids[i] // page_rows
        start = (ids[i] % page_rows) * row_bytes
        for byte in fixed:
            buffer[at] = byte
            at += 1
        at = _put_length(buffer, at, len(prefix) + _digits(page))
        for byte in prefix:
            buffer[at] = byte
            at += 1
        at = _put_end(buffer, _put_number(buffer, at, page))
        at = _put_argument(buffer, at, start)
        at = _put_argument(buffer, at, start + row_bytes - 1)
    return at


def encode_getrange(prefix: bytes, ids: NDArray[np.int64], page_rows: int, row_bytes: int) -> memoryview:
    """One `GETRANGE <prefix><page> <first byte> <last byte>` per id, int64 [n] ≥ 0, as Redis wants it on the wire."""
    most = len(_FIXED) + len(prefix) + 3 * (_MOST_DIGITS + 2) + 3 * 6
    buffer = np.empty(len(ids) * most, np.uint8)
    size = _encode(_FIXED, np.frombuffer(prefix, np.uint8), ids, page_rows, row_bytes, buffer)
    return buffer[:size].data


class _Closed(ConnectionError):
    """The other side closed the connection: worth a second try where the connection had been idle."""


class _Connection:
    def __init__(self, address: RedisAddress, deadline: float) -> None:
        self._reader = hiredis.Reader()
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._socket = _connect(address, deadline)
        try:
            for command in _greeting(address):
                self.send(hiredis.pack_command(cast(Any, command)), deadline)
                reply: object = self.replies(1, deadline)[0]
                if isinstance(reply, Exception):
                    raise StoreUnavailable(f"{address} refused the connection: {reply}")
        except BaseException:
            self.close()
            raise

    def send(self, data: bytes | memoryview, deadline: float) -> None:
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(data)  # its timeout is for the whole of the data

    def replies(self, count: int, deadline: float) -> list[bytes]:
        """As hiredis gives them: an error reply is an exception among them, not raised."""
        replies: list[bytes] = []
        while len(replies) < count:
            reply = self._reader.gets()
            if reply is not False:
                replies.append(reply)
                continue
            self._socket.settimeout(_left(deadline))
            size = self._socket.recv_into(self._buffer)
            if not size:
                raise _Closed("connection closed by the server")
            self._reader.feed(cast(bytes, self._buffer), 0, size)  # its stub forgets bytearray
        return replies

    def close(self) -> None:
        self._socket.close()


class RedisWire:
    """Connections of one process to one Redis, as many as there are look-ups at once. Thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        self._process = os.getpid()

    def call(self, batches: Sequence[Batch], timeout: float | None) -> list[bytes]:
        """Sends the batches and returns the replies of all commands, in their order.

        Raises StoreUnavailable: unreachable, too slow (`timeout` seconds in all), or an error reply.
        """
        seconds = self._address.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        with self._errors(seconds):
            replies = self._call(batches, deadline)
        for reply in replies:
            if not isinstance(reply, bytes):
                raise StoreUnavailable(f"{self._address} answered: {reply}")
        return replies

    def _call(self, batches: Sequence[Batch], deadline: float) -> list[bytes]:
        connection = self._take()
        if connection is not None:
            try:
                return self._exchange(connection, batches, deadline)
            except (_Closed, ConnectionResetError, BrokenPipeError):
                self._close_idle()  # closed while idle, as when the server was restarted: a new connection tells
        return self._exchange(_Connection(self._address, deadline), batches, deadline)

    def _exchange(self, connection: _Connection, batches: Sequence[Batch], deadline: float) -> list[bytes]:
        try:
            replies: list[bytes] = []
            for commands, count in batches:
                connection.send(commands, deadline)
                replies += connection.replies(count, deadline)
        except BaseException:
            connection.close()  # replies may still be under way: this connection cannot be used again
            raise
        with self._lock:
            self._idle.append(connection)
        return replies

    def _take(self) -> _Connection | None:
        with self._lock:
            if self._process != os.getpid():  # after a fork these sockets are the parent's
                self._process, self._idle = os.getpid(), []
            return self._idle.pop() if self._idle else None

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def _errors(self, seconds: float) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable:
            raise
        except TimeoutError as error:
            raise StoreUnavailable(f"{self._address} did not answer within {seconds:g} s") from error
        except (OSError, hiredis.HiredisError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StoreUnavailable(f"{self._address} cannot be reached: {reason}") from error

    def close(self) -> None:
        self._close_idle()


def _connect(address: RedisAddress, deadline: float) -> socket.socket:
    if address.socket is not None:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            plain.settimeout(_left(deadline))
            plain.connect(address.socket)
        except BaseException:
            plain.close()
            raise
        return plain
    context = ssl.create_default_context(cafile=address.ca_file) if address.tls else None
    plain = socket.create_connection((address.host, address.port), timeout=_left(deadline))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plain if context is None else context.wrap_socket(plain, server_hostname=address.host)


def _greeting(address: RedisAddress) -> Iterator[tuple[str, ...]]:
    if address.password is not None:
        yield ("AUTH", address.username or "default", address.password)
    if address.db:
        yield ("SELECT", str(address.db))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
