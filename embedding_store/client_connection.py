"""One connection from a client to a sidecar: blocking, one exchange at a time, every wait bounded by a deadline.

Deadlines are readings of time.monotonic().
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding_store.errors import InvalidStoreURL, ProtocolError, StoreError
from embedding_store.protocol import ERROR_CODES

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 16  # an error reply; longer is no reply of a sidecar
_CRLF = b"\r\n"


class ErrorReplyError(Exception):
    """The sidecar answered with an error; the connection is as good as before. `error` is what it stands for."""

    def __init__(self, error: StoreError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class Address:
    """Where a sidecar listens: a path, or host and port."""

    text: str
    path: str = ""
    host: str = ""
    port: int = 0


def parse_address(text: str) -> Address:
    """`unix:///path`, `tcp://host:port`, or a path. Raises InvalidStoreURL."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme == "unix":
        path = rest if separator else text
        if path:
            return Address(f"unix://{Path(path).absolute()}", path=path)
    elif scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if host and port.isdecimal() and 0 < int(port) < 65536:
            return Address(text, host=host.removeprefix("[").removesuffix("]"), port=int(port))
    raise InvalidStoreURL(f"sidecar address {text!r}; accepted: unix:///PATH, tcp://HOST:PORT or a path")


class Connection:
    """Raises OSError (TimeoutError, ConnectionError …) from every call; who uses it says what that means.

    usable: whether the last exchange came to its end, be it an error reply. A late answer would be taken for the next.
    """

    def __init__(self, address: Address, deadline: float) -> None:
        self.usable = False
        if address.path:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._limit(deadline)
                self._socket.connect(address.path)
            except BaseException:
                self._socket.close()
                raise
        else:
            self._socket = socket.create_connection((address.host, address.port), _left(deadline))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self.usable = False
        self._socket.close()

    def exchange(self, request: Sequence[bytes | memoryview], deadline: float) -> bytes:
        """Sends a command whose answer is one string, simple or bulk. Raises ErrorReplyError, ProtocolError."""
        self._send(request, deadline)
        buffer = bytearray()
        while (end := buffer.find(_CRLF)) < 0:
            self._receive_more(buffer, deadline)
        kind, line = bytes(buffer[:1]), bytes(buffer[1:end])
        if kind == b"-":
            self.usable = True
            raise ErrorReplyError(error_from(line))
        if kind == b"+":
            self.usable = True
            return line
        if kind != b"$" or not line.isdigit():
            raise ProtocolError(f"expected a string from the sidecar, found {bytes(buffer[:40])!r}")
        start = end + 2
        while len(buffer) < start + int(line) + 2:
            self._receive_more(buffer, deadline)
        self.usable = True
        return bytes(buffer[start : start + int(line)])

    def exchange_bulk(self, request: Sequence[bytes | memoryview], length: int, deadline: float) -> NDArray[np.uint8]:
        """Sends a command whose answer is a bulk string of `length` bytes: uint8 [length], in a buffer of its own that
        nobody writes to again, and at a multiple of 8 bytes. Raises ErrorReplyError, ProtocolError."""
        self._send(request, deadline)
        prefix = b"$%d\r\n" % length
        start = -len(prefix) % 8  # numpy's memory begins at a multiple of 16; the payload is to begin at one of 8
        end = start + len(prefix) + length + 2
        whole = np.empty(end, np.uint8)
        view = whole.data
        position = start
        while position < end:
            self._limit(deadline)
            received = self._socket.recv_into(view[position:])
            if not received:
                raise ConnectionResetError("the sidecar closed the connection")
            position += received
            if received < end - start and whole[start] != prefix[0]:
                self._raise_error(bytearray(view[start:position]), deadline)
        if view[start : start + len(prefix)] != prefix or view[end - 2 :] != _CRLF:
            raise ProtocolError(f"expected {prefix!r} from the sidecar, found {bytes(view[start : start + 40])!r}")
        self.usable = True
        return whole[start + len(prefix) : -2]

    def _raise_error(self, buffer: bytearray, deadline: float) -> None:
        while not buffer.endswith(_CRLF):
            self._receive_more(buffer, deadline)
            if len(buffer) > _LONGEST_LINE:
                break
        if not buffer.startswith(b"-") or not buffer.endswith(_CRLF):
            raise ProtocolError(f"expected a bulk string from the sidecar, found {bytes(buffer[:40])!r}")
        self.usable = True
        raise ErrorReplyError(error_from(bytes(buffer[1:-2])))

    def _send(self, parts: Sequence[bytes | memoryview], deadline: float) -> None:
        self.usable = False
        self._limit(deadline)
        sent = self._socket.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._limit(deadline)
                self._socket.sendall(memoryview(part)[sent:])
            sent = max(0, sent - len(part))

    def _receive_more(self, buffer: bytearray, deadline: float) -> None:
        self._limit(deadline)
        received = self._socket.recv(_CHUNK)
        if not received:
            raise ConnectionResetError("the sidecar closed the connection")
        buffer += received

    def _limit(self, deadline: float) -> None:
        self._socket.settimeout(_left(deadline))


def error_from(line: bytes) -> StoreError:
    """`CODE message` as an exception of this package."""
    code, _, message = line.decode(errors="replace").partition(" ")
    kind = ERROR_CODES.get(code)
    return kind(message) if kind is not None else StoreError(f"{code} {message}" if code != "ERR" else message)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
