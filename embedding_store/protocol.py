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
from dataclasses import dataclass

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

    def head(self, counts: NDArray[np.int64], timeout: float | None = None) -> bytearray:
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
    counts = np.array([len(values) for values in ids.values()], np.int64)
    head = RequestLayout(release, list(ids)).head(counts, timeout)
    return bytes(head) + b"".join(values.astype(_INT64).tobytes() for values in ids.values())


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """key: the same for all requests that name the same tables of the same release in the same order; `request_names`
    reads it. counts: int64 [t]. ids: int64 [Σ counts], a view into the frame. timeout: seconds, None for no limit."""

    key: bytes
    counts: NDArray[np.int64]
    ids: NDArray[np.int64]
    timeout: float | None


def decode_request(frame: bytearray) -> LookupRequest:
    """All but the names. Raises ProtocolError saying which part of the frame is wrong, with what was found there."""
    tables, release_bytes, milliseconds = _read_header(frame, REQUEST_MAGIC, "request")
    text_start = _HEADER.size + tables * _ENTRY_BYTES
    if len(frame) < text_start:
        raise ProtocolError(f"request of {len(frame)} bytes ends inside its directory of {tables} tables")
    directory = np.frombuffer(frame, _WORD, 2 * tables, _HEADER.size)
    counts = directory[::2].astype(np.int64)
    total = int(counts.sum())
    ids_start = len(frame) - 8 * total
    if ids_start < text_start or ids_start % 8:
        raise ProtocolError(
            f"request of {len(frame)} bytes; header, {tables} tables and {total} ids make {text_start + 8 * total}, "
            "and the names a multiple of 8 besides"
        )
    lengths = directory[1::2].tobytes()
    key = release_bytes.to_bytes(2, "little") + lengths + frame[text_start:ids_start]
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


@dataclass(frozen=True, slots=True)
class ReplyPlaces:
    """Offsets in one reply's payload. starts: int64 [t], where each table's rows begin."""

    starts: NDArray[np.int64]
    status: int
    bytes: int  # of the whole payload


class ReplyLayout:
    """Replies with rows of these tables, from both sides' point of view. row_bytes: of one row of each table."""

    def __init__(self, release: str, row_bytes: Sequence[int]) -> None:
        name = release.encode()
        self.release = release
        self._row_bytes = np.array(row_bytes, np.int64)
        self._head = np.zeros(_HEADER.size + len(row_bytes) * _ENTRY_BYTES + padded(len(name)), np.uint8)
        fixed = _HEADER.pack(REPLY_MAGIC, len(row_bytes), len(name), 0, 0)
        self._head[: len(fixed)] = np.frombuffer(fixed, np.uint8)
        self._directory(self._head)[1::2] = self._row_bytes
        text = len(self._head) - padded(len(name))
        self._head[text : text + len(name)] = np.frombuffer(name, np.uint8)

    def places(self, counts: NDArray[np.int64]) -> ReplyPlaces:
        """counts: int64 [t], rows of each table."""
        sizes = (counts * self._row_bytes + 7) & ~7
        ends = np.cumsum(sizes)
        status = len(self._head) + (int(ends[-1]) if len(ends) else 0)
        return ReplyPlaces(len(self._head) + ends - sizes, status, status + padded(int(counts.sum())))

    def prepare(self, payload: NDArray[np.uint8], counts: NDArray[np.int64], places: ReplyPlaces) -> NDArray[np.uint8]:
        """Writes all of a payload that does not depend on the rows; returns the view for their status, uint8 [n]."""
        payload[: len(self._head)] = self._head
        self._directory(payload)[::2] = counts
        used = places.starts + counts * self._row_bytes
        for start, end in zip(used.tolist(), [*places.starts.tolist(), places.status][1:], strict=True):
            if start != end:
                payload[start:end] = 0
        end = places.status + int(counts.sum())
        payload[end:] = 0
        return payload[places.status : end]

    def read(
        self, payload: NDArray[np.uint8], counts: NDArray[np.int64]
    ) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Per table (rows uint8 [n, row_bytes], status uint8 [n]), views into `payload`, where `counts` were asked for.

        Raises ProtocolError where the reply is another's.
        """
        places = self.places(counts)
        if len(payload) != places.bytes:
            raise ProtocolError(f"reply of {len(payload)} bytes; the look-up's answer has {places.bytes}")
        expected = self._head.copy()
        self._directory(expected)[::2] = counts
        if payload[: len(expected)].tobytes() != expected.tobytes():
            raise self._other_reply(payload[: len(expected)], counts)
        total = int(counts.sum())
        status = payload[places.status : places.status + total]
        if total and status.max() > STALE:
            raise ProtocolError(f"reply has a row of status {status.max()}; known are 0 to {STALE}")
        answer, first = [], 0
        for start, count, width in zip(places.starts.tolist(), counts.tolist(), self._row_bytes.tolist(), strict=True):
            rows = payload[start : start + count * width].reshape(count, width)
            answer.append((rows, status[first : first + count]))
            first += count
        return answer

    def _directory(self, payload: NDArray[np.uint8]) -> NDArray[np.uint32]:
        return payload[_HEADER.size : _HEADER.size + len(self._row_bytes) * _ENTRY_BYTES].view(_WORD)

    def _other_reply(self, head: NDArray[np.uint8], counts: NDArray[np.int64]) -> ProtocolError:
        try:
            tables, release_bytes, _ = _read_header(head.tobytes(), REPLY_MAGIC, "reply")
        except ProtocolError as error:
            return error
        found = self._directory(head).reshape(-1, 2).tolist()[:20]
        asked = list(zip(counts.tolist(), self._row_bytes.tolist(), strict=True))[:20]
        name = head[_HEADER.size + len(counts) * _ENTRY_BYTES :].tobytes()
        return ProtocolError(
            f"reply of {tables} tables, rows and row bytes {found}, of release {name!r} with {release_bytes} bytes; "
            f"asked: {len(counts)} tables, {asked}, of {self.release}"
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
