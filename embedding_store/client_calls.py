"""What clients ask a sidecar, and how they read its answers: for the blocking and the async client alike.

A call is a generator. It yields an `Exchange`, is sent the reply's content, and returns its result; who runs it does
the I/O, in whatever way it can wait.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store import resp
from embedding_store.dedupe import dedupe_tables
from embedding_store.errors import ProtocolError
from embedding_store.lookup import LookupReply, TableRows
from embedding_store.protocol import ReplyLayout, RequestLayout
from embedding_store.release import ReleaseEntry, ReleaseManifest

_T = TypeVar("_T")
_EMPTY = np.empty(0, np.int64)
# Of the time that is left, what the sidecar is not given to wait for its store: its stand-ins need to get here, too.
_RESERVED_SHARE, _RESERVED_SECONDS = 0.1, 0.05
_MOST_LAYOUTS = 1024  # combinations of tables; a client asks for few

Parts = Sequence[bytes | bytearray | memoryview]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One command. request: what to send, where the answer may take so many seconds. length: of the string that
    answers it, where that is known. meanwhile: to be called when the request is sent, with the place that the string
    will be received in, uint8 [length]; the sidecar works at that time, and this process has nothing else to do."""

    request: Callable[[float], Parts]
    length: int | None = None
    meanwhile: Callable[[NDArray[np.uint8]], None] | None = None


Call: TypeAlias = Generator[Exchange, NDArray[np.uint8], _T]


def simple(*arguments: bytes) -> Exchange:
    request = (resp.command(*arguments),)
    return Exchange(lambda seconds: request)


class SidecarCalls:
    """Thread-safe. Manifests are read once: a release never changes."""

    def __init__(self) -> None:
        self._manifests: dict[str, ReleaseManifest] = {}
        self._layouts: dict[tuple[str, ...], tuple[RequestLayout, ReplyLayout]] = {}
        dedupe_tables(_EMPTY, _EMPTY)  # compiles or loads the kernel now, not inside the first request's timeout

    def lookup(self, release: str, ids: Mapping[str, NDArray[np.int64]]) -> Call[LookupReply]:
        """Asks for each distinct id once. Rows are views into the buffer that the reply was received in."""
        layouts = self._layouts.get((release, *ids))
        if layouts is None:
            layouts = yield from self._layout(release, tuple(ids))
        if not ids:
            return LookupReply(release, {})
        request_layout, reply_layout = layouts
        # One copy brings the tables' ids together, writable and contiguous: what the kernel was compiled for.
        asked = np.concatenate(list(ids.values()), dtype=np.int64, casting="same_kind")
        asked_counts = [len(values) for values in ids.values()]
        distinct, distinct_counts, index = dedupe_tables(asked, np.array(asked_counts, np.int64))
        counts: list[int] = distinct_counts.tolist()
        places = reply_layout.places(counts)

        def request(seconds: float) -> Parts:
            head = request_layout.head(counts, seconds - min(_RESERVED_SHARE * seconds, _RESERVED_SECONDS))
            opening = b"*2\r\n$9\r\nTR.LOOKUP\r\n$%d\r\n" % (len(head) + distinct.nbytes)
            return opening + head, distinct.data.cast("B"), b"\r\n"

        tables: dict[str, TableRows] = {}
        reply_head = bytearray()

        def lay_out(payload: NDArray[np.uint8]) -> None:
            reply_head[:] = reply_layout.head(counts)
            status = payload[places.status :]
            first = first_asked = 0
            for table, start, count, width, count_asked in zip(
                ids, places.starts, counts, reply_layout.row_bytes, asked_counts, strict=True
            ):
                rows = payload[start : start + count * width].reshape(count, width)
                last, last_asked = first + count, first_asked + count_asked
                tables[table] = TableRows(rows, status[first:last], index[first_asked:last_asked])
                first, first_asked = last, last_asked

        payload = yield Exchange(request, places.bytes, lay_out)
        reply_layout.check(payload, reply_head, places, len(distinct))
        return LookupReply(release, tables)

    def _layout(self, release: str, tables: tuple[str, ...]) -> Call[tuple[RequestLayout, ReplyLayout]]:
        manifest = yield from self.manifest(release)
        row_bytes = [manifest.table(table).row_bytes for table in tables]
        if len(self._layouts) >= _MOST_LAYOUTS:
            self._layouts.clear()
        layouts = RequestLayout(release, tables), ReplyLayout(release, row_bytes)
        self._layouts[release, *tables] = layouts
        return layouts

    def manifest(self, release: str | None = None, model: str | None = None) -> Call[ReleaseManifest]:
        if release is not None and release in self._manifests:
            return self._manifests[release]
        name = release if release is not None else model
        content = yield simple(b"TR.INFO", *([] if name is None else [name.encode()]))
        manifest = _decoded(content, ReleaseManifest, "TR.INFO's reply is no release manifest")
        self._manifests[manifest.name] = manifest
        return manifest

    def releases(self) -> Call[list[ReleaseEntry]]:
        content = yield simple(b"TR.RELEASES")
        return _decoded(content, list[ReleaseEntry], "TR.RELEASES' reply is no list of releases")

    def info(self) -> Call[dict[str, str]]:
        content = yield simple(b"INFO")
        lines = content.tobytes().decode().splitlines()
        return dict(line.split(":", 1) for line in lines if line and not line.startswith("#"))

    def ping(self) -> Call[None]:
        yield simple(b"PING")


def _decoded(content: NDArray[np.uint8], kind: type[_T], fault: str) -> _T:
    try:
        return msgspec.json.decode(content.tobytes(), type=kind)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"{fault}: {error}") from error
