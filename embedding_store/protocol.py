"""The payloads of TR.LOOKUP: one request frame and one reply frame, all tables of a request in one round trip.

The layout, its limits and its test vectors are in docs/protocol.md. Everything is little-endian, and the ids and
each table's rows start at a multiple of 8 bytes, so that both sides read them where they lie.

    request   header 16 | directory 8 x tables | text, zero-padded to 8 | ids: int64, table after table
    reply     header 16 | directory 8 x tables | text, zero-padded to 8 | per table: rows, zero-padded to 8 |
              status: uint8, table after table, zero-padded to 8

Requests of one client mostly name the same tables in the same order, with other counts and ids. What follows from the
names alone is worked out once, by `RequestLayout` and `ReplyLayout`; what is left per request is array code.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedding_store.errors import ProtocolError, StoreError, StoreUnavailable, UnknownRelease, UnknownTable
from embedding_store.lookup import STALE

REQUEST_MAGIC = b"TRQ1"
REPLY_MAGIC = b"TRR1"
MAX_TABLES = 0xFFFF
MAX_TIMEOUT_MS = 0xFFFFFFFF
TOO_MANY_CLIENTS = "max number of clients reached"  # as Redis puts it: clients know it by this text

# First word of an error reply, and what it means on both sides. Other errors of the store travel as ERR.
ERROR_CODES: dict[str, type[StoreError]] = {
    "PROTOCOL": ProtocolError,
    "UNKNOWNRELEASE": UnknownRelease,
    "UNKNOWNTABLE": UnknownTable,
    "UNAVAILABLE": StoreUnavailable,
}

_HEADER = struct.Struct("<4sHHII")  # magic, tables, bytes of the release's name, timeout in ms (reply: 0), 0
_TIMEOUT = struct.Struct("<I")
_TIMEOUT_AT = 8
# A directory entry is two words. Request: ids | bytes of the table's name, in two bytes, then two of zero.
# Reply: rows | bytes of one row.
_WORD = np.dtype("<u4")
_ENTRY_BYTES = 8
_INT64 = np.dtype("<i8")
_STATUSES = bytes(range(STALE + 1))


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 8."""
    return (length + 7) & ~7


def error_code(error: StoreError) -> str:
    return next((code for code, kind in ERROR_CODES.items() if isinstance(error, kind)), "ERR")


class RequestLayout:
    """Requests for these tables of this release. Raises ProtocolError where the names do not fit a frame."""

    def __init__(self, release: str, tables: Sequence[str]) -> None:
        if len(tables) > MAX_TABLES:
            raise ProtocolError(f"a request names {len(tables)} tables; at most {MAX_TABLES} fit")
        text = [release.encode(), *(name.encode() for name in tables)]
        for name in text:
            if not 0 < len(name) <= 0xFFFF:
                raise ProtocolError(f"a name of {len(name)} bytes, {name[:40]!r}; 1 to 65535 fit")
        directory = np.array([(0, len(name)) for name in text[1:]], _WORD).tobytes()
        joined = b"".join(text)
        self._head = (
            _HEADER.pack(REQUEST_MAGIC, len(tables), len(text[0]), 0, 0)
            + directory
            + joined.ljust(padded(len(joined)), b"\0")
        )
        self._tables = len(tables)

    def head(self, counts: Sequence[int], timeout: float | None = None) -> bytearray:
        """A request up to its ids: the frame is these bytes and then int64 ids, counts[i] of them for the i-th table.

        A timeout is sent in whole milliseconds, rounded up; 0 would mean "no limit".
        """
        head = bytearray(self._head)
        if timeout is not None:
            _TIMEOUT.pack_into(head, _TIMEOUT_AT, min(max(1, -int(-timeout * 1000 // 1)), MAX_TIMEOUT_MS))
        np.frombuffer(head, _WORD, 2 * self._tables, _HEADER.size)[::2] = counts
        return head


def encode_request(release: str, ids: Mapping[str, NDArray[np.int64]], timeout: float | None = None) -> bytes:
    """The whole frame. Clients of this package send head and ids apart instead, which saves a copy."""
    head = RequestLayout(release, list(ids)).head([len(values) for values in ids.values()], timeout)
    return bytes(head) + b"".join(values.astype(_INT64).tobytes() for values in ids.values())


class LookupRequest(NamedTuple):
    """key: the same for all requests that name the same tables of the same release in the same order; `request_names`
    reads it. counts: ids per table. ids: int64 [Σ counts], a view into the frame. timeout: seconds, None: no limit."""

    key: bytes
    counts: list[int]
    ids: NDArray[np.int64]
    timeout: float | None


def decode_request(frame: bytearray) -> LookupRequest:
    """All but the names. Raises ProtocolError saying which part of the frame is wrong, with what was found there."""
    tables, release_bytes, milliseconds = _read_header(frame, REQUEST_MAGIC, "request")
    text_start = _HEADER.size + tables * _ENTRY_BYTES
    if len(frame) < text_start:
        raise ProtocolError(f"request of {len(frame)} bytes ends inside its directory of {tables} tables")
    directory = np.frombuffer(frame, _WORD, 2 * tables, _HEADER.size)
    counts: list[int] = directory[::2].tolist()
    total = sum(counts)
    ids_start = len(frame) - 8 * total
    if ids_start < text_start or ids_start % 8:
        raise ProtocolError(
            f"request of {len(frame)} bytes; header, {tables} tables and {total} ids make {text_start + 8 * total}, "
            "and the names a multiple of 8 besides"
        )
    key = release_bytes.to_bytes(2, "little") + directory[1::2].tobytes() + frame[text_start:ids_start]
    ids = np.frombuffer(frame, _INT64, total, ids_start)
    return LookupRequest(key, counts, ids, milliseconds / 1000 if milliseconds else None)


def request_names(request: LookupRequest) -> tuple[str, tuple[str, ...]]:
    """The release and the tables that `key` names. Raises ProtocolError."""
    lengths = np.frombuffer(request.key, _WORD, len(request.counts), 2)
    release_bytes = int.from_bytes(request.key[:2], "little")
    text = request.key[2 + lengths.nbytes :]
    if not release_bytes:
        raise ProtocolError("request names no release")
    if len(lengths) and lengths.max() > 0xFFFF:
        place = int(lengths.argmax())
        raise ProtocolError(f"request's table {place}: the directory's reserved field is {lengths[place] >> 16}, not 0")
    end = release_bytes + int(lengths.sum())
    if len(text) != padded(end) or any(text[end:]):
        raise ProtocolError(
            f"request has {len(text)} bytes between its directory and its ids; "
            f"its names have {end}, and zeros up to {padded(end)}"
        )
    ends = np.cumsum(lengths, dtype=np.int64) + release_bytes
    tables = tuple(_text(text[end - length : end]) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True))
    if "" in tables:
        raise ProtocolError(f"request's table {tables.index('')} has an empty name")
    if len(set(tables)) < len(tables):
        raise ProtocolError(f"request names the table {Counter(tables).most_common(1)[0][0]!r} twice")
    return _text(text[:release_bytes]), tables


class ReplyPlaces(NamedTuple):
    """Offsets in one reply's payload. starts: where each table's rows begin."""

    starts: list[int]
    status: int
    bytes: int  # of the whole payload


class ReplyLayout:
    """Replies with rows of these tables, from both sides' point of view. row_bytes: of one row of each table."""

    def __init__(self, release: str, row_bytes: Sequence[int]) -> None:
        name = release.encode()
        self.release = release
        self.row_bytes = list(row_bytes)
        self._head = bytearray(_HEADER.pack(REPLY_MAGIC, len(row_bytes), len(name), 0, 0))
        self._head += np.array([(0, width) for width in row_bytes], _WORD).tobytes()
        self._head += name.ljust(padded(len(name)), b"\0")

    def places(self, counts: Sequence[int]) -> ReplyPlaces:
        """counts: rows of each table."""
        starts, end = [], len(self._head)
        for count, width in zip(counts, self.row_bytes, strict=True):
            starts.append(end)
            end += (count * width + 7) & ~7
        return ReplyPlaces(starts, end, end + padded(sum(counts)))

    def head(self, counts: Sequence[int]) -> bytearray:
        """A payload up to its rows. All that is not written after that, to `places`, is to be zero."""
        head = bytearray(self._head)
        self._directory(head)[::2] = counts
        return head

    def check(self, payload: NDArray[np.uint8], head: bytearray, places: ReplyPlaces, rows: int) -> None:
        """Raises ProtocolError where it is not the reply to a look-up of `rows` ids with this `head` and `places`."""
        if len(payload) != places.bytes:
            raise ProtocolError(f"reply of {len(payload)} bytes; the look-up's answer has {places.bytes}")
        found = payload[: len(head)].tobytes()
        if found != head:
            raise self._other_reply(found, head)
        unknown = payload[places.status : places.status + rows].tobytes().translate(None, _STATUSES)
        if unknown:
            raise ProtocolError(f"reply has a row of status {unknown[0]}; known are 0 to {STALE}")

    def _directory(self, payload: bytes | bytearray) -> NDArray[np.uint32]:
        return np.frombuffer(payload, _WORD, 2 * len(self.row_bytes), _HEADER.size)

    def _other_reply(self, found: bytes, head: bytearray) -> ProtocolError:
        try:
            tables, release_bytes, _ = _read_header(found, REPLY_MAGIC, "reply")
        except ProtocolError as error:
            return error
        shapes, asked = (self._directory(content).reshape(-1, 2).tolist()[:20] for content in (found, head))
        name = found[_HEADER.size + len(self.row_bytes) * _ENTRY_BYTES :]
        return ProtocolError(
            f"reply of {tables} tables, rows and row bytes {shapes}, of release {name!r} with {release_bytes} bytes; "
            f"asked: {len(self.row_bytes)} tables, {asked}, of {self.release}"
        )


def _read_header(frame: bytes | bytearray, magic: bytes, kind: str) -> tuple[int, int, int]:
    """(tables, bytes of the release's name, timeout)."""
    if len(frame) < _HEADER.size:
        raise ProtocolError(f"{kind} of {len(frame)} bytes; its header alone has {_HEADER.size}")
    found, tables, release_bytes, timeout, reserved = _HEADER.unpack_from(frame)
    if found != magic:
        raise ProtocolError(f"{kind} starts with {found!r}; expected {magic!r}")
    if reserved:
        raise ProtocolError(f"{kind}'s reserved field is {reserved}; it is to be 0")
    return tables, release_bytes, timeout


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"request has a name that is not UTF-8: {name!r}") from error
