"""RESP, the wire format of Redis, as a server speaks it: commands in, replies out (versions 2 and 3).

Commands are arrays of bulk strings, which is all that clients send. They are parsed here and not by hiredis, whose
reader parses replies: it has no limit to a declared length or element count, which here come from strangers.
"""

from __future__ import annotations

from collections.abc import Iterable

from embedding_store.errors import ProtocolError

MAX_ARGUMENTS = 64
FRAME_BEFORE_AUTH = 16 << 10  # bytes, Redis's own limit; no greeting is longer
_MAX_LINE = 32  # of "*N" and "$N": more digits than any length has

OK = b"+OK\r\n"


class CommandParser:
    """Bytes in, in pieces of any size; commands out, in order. Never holds more than one frame and one piece.

    After a ProtocolError the stream has no known position any more: the connection is to be closed. authenticated: set
    by whoever executes the commands; before it, frames have FRAME_BEFORE_AUTH bytes at most.
    """

    def __init__(self, max_frame: int) -> None:
        self._max_frame = max_frame
        self.authenticated = True
        self._buffer: bytes | bytearray = b""
        self._position = 0
        self._reset()

    def _reset(self) -> None:
        self._arguments: list[bytearray] = []
        self._missing = 0  # arguments of the current command still to come
        self._bulk = -1  # declared length of the argument that comes next, -1 before its line was read
        self._frame = 0  # bytes of the current command so far, declared ones included

    def feed(self, data: bytes) -> None:
        if self._position == len(self._buffer):
            self._buffer = data
        else:
            if self._position or isinstance(self._buffer, bytes):
                self._buffer = bytearray(memoryview(self._buffer)[self._position :])
            self._buffer += data
        self._position = 0

    @property
    def inside_command(self) -> bool:
        """Whether bytes of a command have come whose end has not been parsed."""
        return self._missing > 0 or self._position < len(self._buffer)

    def next(self) -> list[bytearray] | None:
        """The next whole command, None until more bytes come. Raises ProtocolError."""
        if not self._missing:
            count = self._length(b"*")
            if count is None:
                return None
            if not 0 < count <= MAX_ARGUMENTS:
                raise ProtocolError(f"a command of {count} arguments; 1 to {MAX_ARGUMENTS} are accepted")
            self._missing = count
        while self._missing:
            argument = self._argument()
            if argument is None:
                return None
            self._arguments.append(argument)
            self._missing -= 1
        command = self._arguments
        self._reset()
        return command

    def _argument(self) -> bytearray | None:
        if self._bulk < 0:
            length = self._length(b"$")
            if length is None:
                return None
            self._bulk = length
            self._frame += length + 2
            self._check_frame()
        end = self._position + self._bulk
        if len(self._buffer) < end + 2:
            return None
        if self._buffer[end : end + 2] != b"\r\n":
            raise ProtocolError(
                f"an argument of {self._bulk} bytes is followed by {bytes(self._buffer[end : end + 2])!r}"
            )
        argument = bytearray(memoryview(self._buffer)[self._position : end])
        self._position = end + 2
        self._bulk = -1
        return argument

    def _check_frame(self) -> None:
        if self._frame > self._max_frame:
            raise ProtocolError(f"a frame of {self._frame} bytes or more; at most {self._max_frame} are accepted")
        if self._frame > FRAME_BEFORE_AUTH and not self.authenticated:
            raise ProtocolError(
                f"a frame of {self._frame} bytes or more; at most {FRAME_BEFORE_AUTH} are accepted before AUTH"
            )

    def _length(self, kind: bytes) -> int | None:
        """Reads a line such as `*3` or `$16`."""
        start = self._position
        found = bytes(self._buffer[start : start + 1])
        if not found:
            return None
        if found != kind:
            raise ProtocolError(f"expected {kind.decode()!r}, found {found!r}")
        end = self._buffer.find(b"\r\n", start, start + _MAX_LINE)
        digits = bytes(self._buffer[start + 1 : end if end >= 0 else start + _MAX_LINE])
        if end < 0 and len(digits) < _MAX_LINE - 1:
            return None
        if end < 0 or not digits.isdigit():
            raise ProtocolError(f"{digits!r} after {kind.decode()!r} is no length")
        self._position = end + 2
        self._frame += end + 2 - start
        return int(digits)


def simple(text: str) -> bytes:
    return b"+%s\r\n" % text.encode()


def error(code: str, message: str) -> bytes:
    """`-CODE message`, kept to one line whatever the message holds."""
    line = " ".join(message.split())
    return b"-%s %s\r\n" % (code.encode(), line.encode(errors="replace"))


def integer(value: int) -> bytes:
    return b":%d\r\n" % value


def bulk(content: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(content), content)


def array(items: Iterable[bytes]) -> bytes:
    """items: encoded replies."""
    parts = list(items)
    return b"*%d\r\n%s" % (len(parts), b"".join(parts))


def mapping(items: dict[str, bytes], version: int) -> bytes:
    """values: encoded replies. RESP 2 has no maps: there it is an array of keys and values in turn."""
    body = b"".join(bulk(key.encode()) + value for key, value in items.items())
    return (b"%%%d\r\n" % len(items) if version == 3 else b"*%d\r\n" % (2 * len(items))) + body


def bulk_buffer(length: int) -> tuple[bytearray, int]:
    """A bulk string to be filled in, and where its content begins, `length` bytes of zero."""
    prefix = b"$%d\r\n" % length
    whole = bytearray(len(prefix) + length + 2)
    whole[: len(prefix)] = prefix
    whole[-2:] = b"\r\n"
    return whole, len(prefix)


def command(*arguments: bytes) -> bytes:
    """What a client sends."""
    return array(bulk(argument) for argument in arguments)
