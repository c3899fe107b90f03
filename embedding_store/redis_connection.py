"""One connection to a Redis node: made, greeted and spoken over by talks, see `talks.py`."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from select import POLLIN, POLLOUT
from typing import Any, cast

import hiredis
import numpy as np
from numpy.typing import NDArray

from embedding_store.errors import InvalidStoreURL, ProtocolError
from embedding_store.redis_fetch import PageFetch
from embedding_store.redis_url import RedisAddress
from embedding_store.talks import Talk, pause, ready

Refusals = dict[str, list[int]]  # error reply -> the commands that it answered

_SEND_BYTES = 1 << 16
_RECEIVE_BYTES = 1 << 18
_ROOM = 1 << 16  # least that is free when more is received
_LONGEST_REPLY = 1 << 26
_FIRST_COMMANDS = 64  # a small first part, so that the node is at work while the others are being written
_ERRORS = 64  # error replies read by one call of the kernel
_AGAIN = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ConnectionRefusedByNode(ConnectionError):
    """It answered the greeting with an error, as for wrong credentials."""


class RedisConnection:
    """For one exchange at a time. heard: whether anything came in the one that is under way, or was the last."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._descriptor = connected.fileno()
        self._output = np.empty(_SEND_BYTES, np.uint8)
        self._input = np.empty(_RECEIVE_BYTES, np.uint8)
        self._errors = np.empty((_ERRORS, 3), np.int64)
        self._at = self._end = 0  # of `_input`, what has been received and not decoded
        self._replies = 0
        self.heard = False

    def ask(self, fetch: PageFetch, commands: NDArray[np.int64], limit: float, asking: bool) -> Talk[Refusals]:
        """Sends these commands and reads their replies into `fetch`, both at the same time: neither side ever waits
        for a buffer of the other that nobody empties. asking: see `redis_wire.encode`.

        Raises TimeoutError, OSError, ProtocolError; the connection is of no use then, the rows that came are.
        """
        refusals: Refusals = {}
        expected = len(commands) * (2 if asking else 1)
        encoded, most, unsent = 0, _FIRST_COMMANDS, memoryview(b"")
        self._at = self._end = self._replies = 0
        self.heard = False
        while self._replies < expected:
            if not unsent and encoded < len(commands):
                encoded, size = fetch.encode(commands, encoded, most, asking, self._output)
                unsent, most = self._output.data[:size], len(commands)
            unsent = unsent[self._send(unsent) :]
            to_send = POLLOUT if unsent or encoded < len(commands) else 0
            events = yield from ready(self._descriptor, POLLIN | to_send, limit)
            while events & ~POLLOUT:
                self._make_room()
                self._end += self._receive(self._input[self._end :])
                self._decode(fetch, commands, asking, refusals)
                if not self._pending():
                    break
        return refusals

    def _decode(self, fetch: PageFetch, commands: NDArray[np.int64], asking: bool, refusals: Refusals) -> None:
        """What has been received, as far as it is whole."""
        errors = _ERRORS
        while errors == _ERRORS:
            self._at, self._replies, errors, sound = fetch.decode(
                self._input, self._at, self._end, commands, self._replies, asking, self._errors
            )
            for command, begin, end in self._errors[:errors].tolist():
                line = self._input[begin:end].tobytes().decode(errors="replace")
                refusals.setdefault(line, []).append(command)
            if not sound:
                raise ProtocolError(f"{self._input[self._at : self._end][:40].tobytes()!r}")

    def request(self, command: tuple[str, ...], limit: float) -> Talk[object]:
        """One command that is not about rows, and its reply as hiredis gives it: errors too, not raised."""
        reader = hiredis.Reader()
        unsent = memoryview(hiredis.pack_command(cast(Any, command)))
        self.heard = False
        while (reply := reader.gets()) is False:
            unsent = unsent[self._send(unsent) :]
            events = yield from ready(self._descriptor, POLLIN | (POLLOUT if unsent else 0), limit)
            while events & ~POLLOUT:
                received = self._receive(self._input)
                reader.feed(cast(bytes, self._input.data), 0, received)
                if not self._pending():
                    break
        return cast(object, reply)

    def close(self) -> None:
        self._socket.close()

    def _send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data) if data else 0
        except _AGAIN:
            return 0

    def _receive(self, into: NDArray[np.uint8]) -> int:
        try:
            received = self._socket.recv_into(into.data)
        except _AGAIN:
            return 0
        if not received:
            raise ConnectionResetError(errno.ECONNRESET, "connection closed by the server")
        self.heard = True
        return received

    def _pending(self) -> bool:
        """Whether something has been received that poll does not know of."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def _make_room(self) -> None:
        """Enough behind what is not decoded yet, input[at:end], which moves to the front for that."""
        if self._at < self._end and len(self._input) - self._end >= _ROOM:
            return
        rest = self._input[self._at : self._end]
        if len(self._input) - len(rest) < _ROOM:
            if len(self._input) >= _LONGEST_REPLY:
                raise ProtocolError(f"a reply of more than {len(rest)} bytes")
            self._input = np.empty(2 * len(self._input), np.uint8)
        self._input[: len(rest)] = rest
        self._at, self._end = 0, len(rest)


def open_connection(address: RedisAddress, tls: ssl.SSLContext | None, limit: float) -> Talk[RedisConnection]:
    """Raises TimeoutError, OSError, ConnectionRefusedByNode."""
    connected = yield from _connect(address, limit)
    try:
        if tls is not None:
            connected = tls.wrap_socket(connected, server_hostname=address.host, do_handshake_on_connect=False)
            yield from _shake_hands(connected, limit)
        connection = RedisConnection(connected)
        for command in _greeting(address):
            reply = yield from connection.request(command, limit)
            if isinstance(reply, Exception):
                raise ConnectionRefusedByNode(str(reply))
    except BaseException:
        connected.close()
        raise
    return connection


def tls_context(address: RedisAddress) -> ssl.SSLContext | None:
    """None where the address is without TLS. Raises InvalidStoreURL for files that hold something else."""
    if not address.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=address.ca_file)
        if address.cert_file is not None:
            context.load_cert_chain(address.cert_file, address.key_file)
    except OSError as error:
        files = ", ".join(filter(None, (address.ca_file, address.cert_file, address.key_file)))
        raise InvalidStoreURL(f"cannot use the TLS files {files}: {error.strerror or error}") from error
    return context


def _connect(address: RedisAddress, limit: float) -> Talk[socket.socket]:
    """To the first of the host's addresses that answers. Looking a name up blocks, and has no limit of ours."""
    failure: OSError | None = None
    for family, where in _places(address):
        plain = socket.socket(family, socket.SOCK_STREAM)
        try:
            plain.setblocking(False)
            if family != socket.AF_UNIX:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (code := plain.connect_ex(where)) == errno.EAGAIN:  # a unix socket with a long queue before it
                yield from pause(0.001, limit)
            if code == errno.EINPROGRESS:
                yield from ready(plain.fileno(), POLLOUT, limit)
                code = plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            return plain
        except OSError as error:
            plain.close()
            failure = error
        except BaseException:
            plain.close()
            raise
    assert failure is not None  # getaddrinfo gives one at least, or raises
    raise failure


def _places(address: RedisAddress) -> Iterator[tuple[int, Any]]:
    if address.socket is not None:
        yield socket.AF_UNIX, address.socket
        return
    for family, _, _, _, where in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        yield family, where


def _shake_hands(connected: ssl.SSLSocket, limit: float) -> Talk[None]:
    while True:
        try:
            connected.do_handshake()
            return
        except ssl.SSLWantReadError:
            yield from ready(connected.fileno(), POLLIN, limit)
        except ssl.SSLWantWriteError:
            yield from ready(connected.fileno(), POLLOUT, limit)


def _greeting(address: RedisAddress) -> Iterator[tuple[str, ...]]:
    if address.username is not None or address.password is not None:  # a user may have no password
        yield ("AUTH", address.username or "default", address.password or "")
    if address.db:
        yield ("SELECT", str(address.db))
    if address.replicas:
        yield ("READONLY",)
