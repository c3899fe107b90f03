"""The payloads of TR.LOOKUP: one request frame and one reply frame, all tables of a request in one round trip.

The layout, its limits and its test vectors are in docs/protocol.md. Everything is little-endian, and the ids and
each table's rows start at a multiple of 8 bytes, so that both sides read them where they lie.

    request   header 16 | directory 8 x tables | text, zero-padded to 8 | ids: int64, table after table
    reply     header 16 | directory 8 x tables | text, zero-padded to 8 | per table: rows, zero-padded to 8 |
              status: uint8, table after table, zero-padded to 8
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.errors import ProtocolError, StoreError, StoreUnavailable, UnknownRelease, UnknownTable
from embedding_store.lookup import STALE, LookupReply

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
_REQUEST_ENTRY = struct.Struct("<IHH")  # ids, bytes of the table's name, 0
_REPLY_ENTRY = struct.Struct("<II")  # rows, bytes of one row
_ENTRY_BYTES = 8

_INT64 = np.dtype("<i8")


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """ids: int64 [n] per table, views into the frame. timeout: seconds, None without a limit."""

    release: str
    ids: Mapping[str, NDArray[np.int64]]
    timeout: float | None


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 8."""
    return (length + 7) & ~7


def error_code(error: StoreError) -> str:
    return next((code for code, kind in ERROR_CODES.items() if isinstance(error, kind)), "ERR")


def request_head(release: str, counts: Mapping[str, int], timeout: float | None = None) -> bytes:
    """A request up to its ids. The frame is these bytes and then int64 ids, `counts[table]` of them per table.

    A timeout is sent in whole milliseconds, rounded up; 0 would mean "no limit". Raises ProtocolError.
    """
    text = [release.encode(), *(name.encode() for name in counts)]
    if len(counts) > MAX_TABLES:
        raise ProtocolError(f"a request names {len(counts)} tables; at most {MAX_TABLES} fit")
    for name in text:
        if not 0 < len(name) <= 0xFFFF:
            raise ProtocolError(f"a name of {len(name)} bytes, {name[:40]!r}; 1 to 65535 fit")
    milliseconds = 0 if timeout is None else min(max(1, -int(-timeout * 1000 // 1)), MAX_TIMEOUT_MS)
    parts = [_HEADER.pack(REQUEST_MAGIC, len(counts), len(text[0]), milliseconds, 0)]
    parts += [_REQUEST_ENTRY.pack(count, len(name), 0) for count, name in zip(counts.values(), text[1:], strict=True)]
    joined = b"".join(text)
    parts.append(joined.ljust(padded(len(joined)), b"\0"))
    return b"".join(parts)


def encode_request(release: str, ids: Mapping[str, NDArray[np.int64]], timeout: float | None = None) -> bytes:
    """The whole frame. `SidecarClient` sends head and ids apart instead, which saves a copy."""
    head = request_head(release, {table: len(values) for table, values in ids.items()}, timeout)
    return head + b"".join(values.astype(_INT64).tobytes() for values in ids.values())


def decode_request(frame: bytearray) -> LookupRequest:
    """Raises ProtocolError saying which part of the frame is wrong, with what was found there."""
    tables, release_bytes, milliseconds = _read_header(frame, REQUEST_MAGIC, "request")
    if release_bytes == 0:
        raise ProtocolError("request names no release")
    directory_end = _HEADER.size + tables * _ENTRY_BYTES
    if len(frame) < directory_end:
        raise ProtocolError(f"request of {len(frame)} bytes ends inside its directory of {tables} tables")
    entries = list(_REQUEST_ENTRY.iter_unpack(memoryview(frame)[_HEADER.size : directory_end]))
    text_end = directory_end + release_bytes + sum(entry[1] for entry in entries)
    total = sum(entry[0] for entry in entries)
    expected = padded(text_end) + 8 * total
    if len(frame) != expected:
        raise ProtocolError(
            f"request of {len(frame)} bytes; its directory of {tables} tables and {total} ids makes {expected}"
        )
    if any(frame[text_end : padded(text_end)]):
        raise ProtocolError("request has other bytes than zero between its names and its ids")
    release = _text(frame, directory_end, release_bytes)
    values = np.frombuffer(frame, _INT64, total, padded(text_end))
    ids: dict[str, NDArray[np.int64]] = {}
    position, start = directory_end + release_bytes, 0
    for number, (count, name_bytes, reserved) in enumerate(entries):
        name = _text(frame, position, name_bytes)
        if reserved or not name or name in ids:
            raise ProtocolError(f"request's table {number}, {name!r}: {_entry_fault(name, reserved)}")
        ids[name] = values[start : start + count]
        position += name_bytes
        start += count
    return LookupRequest(release, ids, milliseconds / 1000 if milliseconds else None)


def _entry_fault(name: str, reserved: int) -> str:
    if reserved:
        return f"the directory's reserved field is {reserved}; it is to be 0"
    return "the same table twice" if name else "an empty name"


def reply_bytes(release: str, shapes: Collection[tuple[int, int]]) -> int:
    """How long a reply is; shapes: (rows, bytes of one row) per table, rows being the asked ids."""
    size, rows = _rows_start(release.encode(), len(shapes)), 0
    for count, width in shapes:
        size += padded(count * width)
        rows += count
    return size + padded(rows)


def _rows_start(release: bytes, tables: int) -> int:
    return _HEADER.size + tables * _ENTRY_BYTES + padded(len(release))


def write_reply(reply: LookupReply, out: NDArray[np.uint8]) -> None:
    """Writes one row per asked id, in asked order; `out` is uint8 [reply_bytes(...)] and is written in full."""
    release = reply.release.encode()
    tables = list(reply.tables.values())
    position = _rows_start(release, len(tables))
    status = len(out) - padded(sum(len(table.index) for table in tables))
    out[status:] = 0
    head = [_HEADER.pack(REPLY_MAGIC, len(tables), len(release), 0, 0)]
    for table in tables:
        count, width = len(table.index), table.rows.shape[1]
        head.append(_REPLY_ENTRY.pack(count, width))
        if not count:
            continue
        end = position + count * width
        # mode="clip" only spares numpy a second buffer: the store's indices are in range.
        table.rows.take(table.index, 0, out[position:end].reshape(count, width), "clip")
        table.status.take(table.index, None, out[status : status + count], "clip")
        position = padded(end)
        out[end:position] = 0
        status += count
    head.append(release.ljust(padded(len(release)), b"\0"))
    joined = b"".join(head)
    out[: len(joined)] = np.frombuffer(joined, np.uint8)


def status_of(payload: NDArray[np.uint8], ids: int) -> NDArray[np.uint8]:
    """The status block of a reply to `ids` ids: uint8 [ids], a view."""
    start = len(payload) - padded(ids)
    return payload[start : start + ids]


def decode_reply(
    payload: NDArray[np.uint8], release: str, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Per table (rows uint8 [n, row_bytes], status uint8 [n]), views into `payload`.

    shapes: what was asked, (ids, bytes of one row) per table. Raises ProtocolError where the reply is another's.
    """
    name = release.encode()
    expected = reply_bytes(release, shapes.values())
    if len(payload) != expected:
        raise ProtocolError(f"reply of {len(payload)} bytes; the look-up's answer has {expected}")
    position = _rows_start(name, len(shapes))
    head = payload[:position].tobytes()
    tables, release_bytes, zero = _read_header(head, REPLY_MAGIC, "reply")
    if tables != len(shapes) or release_bytes != len(name) or zero:
        raise ProtocolError(
            f"reply has {tables} tables of a release of {release_bytes} bytes; asked: {len(shapes)} of {release}"
        )
    found = list(_REPLY_ENTRY.iter_unpack(head[_HEADER.size : _HEADER.size + tables * _ENTRY_BYTES]))
    if found != list(shapes.values()):
        raise ProtocolError(f"reply's rows and row sizes are {found[:20]}; asked: {list(shapes.values())[:20]}")
    if head[_HEADER.size + tables * _ENTRY_BYTES :] != name.ljust(padded(len(name)), b"\0"):
        raise ProtocolError(f"reply comes from another release than {release}: {head[-padded(len(name)) :]!r}")
    status = status_of(payload, sum(count for count, _ in found))
    if len(status) and status.max() > STALE:
        raise ProtocolError(f"reply has a row of status {status.max()}; known are 0 to 3")
    answer: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
    start = 0
    for table, (count, width) in shapes.items():
        end = position + count * width
        answer[table] = payload[position:end].reshape(count, width), status[start : start + count]
        position = padded(end)
        start += count
    return answer


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


def _text(frame: bytearray, start: int, length: int) -> str:
    try:
        return frame[start : start + length].decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(
            f"request has a name that is not UTF-8: {bytes(frame[start : start + length])!r}"
        ) from error
