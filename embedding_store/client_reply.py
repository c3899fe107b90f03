"""One reply of a sidecar, put together from pieces of any size. No I/O: who receives asks for a buffer, fills some of
it and says how much."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedding_store.errors import ProtocolError, StoreError, StoreUnavailable
from embedding_store.protocol import ERROR_CODES, TOO_MANY_CLIENTS

_CRLF = b"\r\n"
_FIRST = 1 << 16  # bytes of buffer where the length is not known yet
_LONGEST_LINE = 1 << 16  # an error reply; longer is no reply of a sidecar
_LONGEST_LENGTH = 32  # of `$N`
_LONGEST_STRING = 1 << 28  # of an unknown length: a manifest, a list of releases


class ErrorReplyError(Exception):
    """The sidecar answered with an error; the connection is as good as before. `error` is what it stands for."""

    def __init__(self, error: StoreError) -> None:
        super().__init__(str(error))
        self.error = error


class ReplyReader:
    """A simple string, an error, or a bulk string.

    length: of the bulk string's content, where it is known. Then it is received where it stays, at a multiple of 8
    bytes, in a buffer that nobody else writes to.
    """

    def __init__(self, length: int | None = None) -> None:
        self._expected = length
        prefix = 0 if length is None else len(b"$%d\r\n" % length)
        self._start = -prefix % 8  # numpy's memory begins at a multiple of 16
        capacity = _FIRST if length is None else prefix + length + 2
        self._bytes = np.empty(self._start + capacity, np.uint8)
        self._position = self._start
        self._content: tuple[int, int] | None = None  # once the first line is read: where the content begins and ends
        self._end = 0  # of the whole reply, once known

    @property
    def reserved(self) -> NDArray[np.uint8]:
        """Where the content will be, uint8 [length], if the length was known."""
        return self._bytes[len(self._bytes) - 2 - (self._expected or 0) : -2]

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty before the reply is whole."""
        return self._bytes.data[self._position :]

    def received(self, count: int) -> bool:
        """Whether the reply is whole, after `count` more bytes. Raises ProtocolError."""
        self._position += count
        if self._content is None:
            self._read_line()
        if self._content is None or self._position < self._end:
            return False
        if self._position > self._end:
            raise ProtocolError(f"the sidecar sent {self._position - self._end} bytes after its answer")
        if self._bytes[self._end - 2 : self._end].tobytes() != _CRLF:
            raise ProtocolError(f"a reply that should end at byte {self._end - self._start} goes on: {self._shown()!r}")
        return True

    def content(self) -> NDArray[np.uint8]:
        """The string, uint8 [length]; call it when the reply is whole. Raises ErrorReplyError."""
        assert self._content is not None
        start, end = self._content
        if self._bytes[self._start] == ord("-"):
            raise ErrorReplyError(error_from(self._bytes[start:end].tobytes()))
        return self._bytes[start:end]

    def _read_line(self) -> None:
        """The first line, where all of it has come: the whole reply, or the length of what follows."""
        kind = self._bytes[self._start : self._start + 1].tobytes()
        is_line = kind == b"-" or (kind == b"+" and self._expected is None)
        longest = _LONGEST_LINE if is_line else _LONGEST_LENGTH
        head = self._bytes[self._start : min(self._position, self._start + longest)].tobytes()
        length = head.find(_CRLF)
        if length < 0 and len(head) < longest and (is_line or kind == b"$"):
            if self._position == len(self._bytes):
                self._grow(2 * len(self._bytes))
            return
        after = self._start + length + 2
        if is_line and length >= 0:
            self._content, self._end = (self._start + 1, after - 2), after
            return
        string = int(head[1:length]) if kind == b"$" and head[1:length].isdigit() else -1
        if string < 0 or (string > _LONGEST_STRING if self._expected is None else string != self._expected):
            raise ProtocolError(f"expected {self._wanted()} from the sidecar, found {head[:40]!r}")
        self._content, self._end = (after, after + string), after + string + 2
        if self._end > len(self._bytes):
            self._grow(self._end)

    def _grow(self, size: int) -> None:
        self._bytes = np.concatenate((self._bytes[: self._position], np.empty(size - self._position, np.uint8)))

    def _wanted(self) -> str:
        return "a string" if self._expected is None else f"a string of {self._expected} bytes"

    def _shown(self) -> bytes:
        return self._bytes[self._start : self._start + 40].tobytes()


def error_from(line: bytes) -> StoreError:
    """`CODE message` as an exception of this package."""
    code, _, message = line.decode(errors="replace").partition(" ")
    if message == TOO_MANY_CLIENTS:
        return StoreUnavailable(message)
    kind = ERROR_CODES.get(code)
    return kind(message) if kind is not None else StoreError(f"{code} {message}" if code != "ERR" else message)
