"""TR.LOOKUP in the sidecar: at once in the event loop where that is quick, else in a thread."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from embedding_store import resp
from embedding_store.errors import ProtocolError, StoreUnavailable
from embedding_store.lookup import ABSENT, STALE, UNAVAILABLE, LookupReply
from embedding_store.protocol import LookupRequest, decode_request, reply_bytes, status_of, write_reply
from embedding_store.release import ReleaseManifest
from embedding_store.served import Remainder, ServedLookup
from embedding_store.sidecar_releases import ServedReleases
from embedding_store.sidecar_stats import SidecarStats

# Larger requests (32,768 ids, some 5 ms) take a thread whatever they hit: the kernels there leave the loop alone.
_LARGE = 256 << 10


@dataclass(frozen=True, slots=True)
class _Answer:
    """An encoded reply, and what it counts for."""

    reply: memoryview
    ids: int
    absent: int
    unavailable: int
    stale: int


class Lookups:
    def __init__(
        self,
        store: ServedLookup,
        releases: ServedReleases,
        threads: ThreadPoolExecutor,
        max_frame: int,
        stats: SidecarStats,
    ) -> None:
        self._store = store
        self._threads = threads
        self._max_frame = max_frame
        self._stats = stats
        self._releases = releases

    def answer(self, frame: bytearray) -> memoryview | Coroutine[None, None, memoryview]:
        """The reply, or the wait for it. Both raise what EmbeddingLookup.lookup raises, and ProtocolError."""
        began = time.perf_counter()
        request = decode_request(frame)
        manifest = self._releases.manifests.get(request.release)
        remainder: Remainder = functools.partial(self._from_the_start, request)
        if manifest is not None and len(frame) <= _LARGE:
            self._check(request, manifest)
            found = self._store.begin(request.release, request.ids)
            if isinstance(found, LookupReply):
                return self._count(_encode(found), began)
            remainder = found
        self._stats.offloaded += 1
        self._stats.waiting += 1
        return self._in_thread(request, remainder, began)

    def _from_the_start(self, request: LookupRequest, timeout: float | None) -> LookupReply:
        manifest = self._releases.manifest(request.release)
        self._check(request, manifest)
        return self._store.lookup(request.release, request.ids, timeout=timeout)

    async def _in_thread(self, request: LookupRequest, remainder: Remainder, began: float) -> memoryview:
        def work() -> _Answer:
            return _encode(remainder(_left(request, began)))

        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except StoreUnavailable:
            self._stats.degraded.record(asked := sum(map(len, request.ids.values())), asked)
            raise
        finally:
            self._stats.waiting -= 1
            if request.timeout is not None and time.perf_counter() - began > request.timeout:
                self._stats.late += 1
        return self._count(answer, began)

    def _check(self, request: LookupRequest, manifest: ReleaseManifest) -> None:
        widths = {table.name: table.row_bytes for table in manifest.tables}
        if not request.ids.keys() <= widths.keys():
            for table in request.ids:
                manifest.table(table)  # raises UnknownTable for one of them
        size = reply_bytes(request.release, [(len(ids), widths[table]) for table, ids in request.ids.items()])
        if size > self._max_frame:
            raise ProtocolError(f"the reply would have {size} bytes; at most {self._max_frame} are sent in one frame")

    def _count(self, answer: _Answer, began: float) -> memoryview:
        stats = self._stats
        stats.lookups += 1
        stats.ids += answer.ids
        stats.absent += answer.absent
        stats.unavailable += answer.unavailable
        stats.stale += answer.stale
        stats.degraded.record(answer.ids, answer.unavailable + answer.stale)
        stats.latency.record(time.perf_counter() - began)
        return answer.reply


def _encode(found: LookupReply) -> _Answer:
    shapes = [(len(table.index), table.rows.shape[1]) for table in found.tables.values()]
    whole, payload = resp.bulk_buffer(reply_bytes(found.release, shapes))
    write_reply(found, payload)
    asked = sum(count for count, _ in shapes)
    status = status_of(payload, asked).tobytes()
    return _Answer(whole, asked, status.count(ABSENT), status.count(UNAVAILABLE), status.count(STALE))


def _left(request: LookupRequest, began: float) -> float | None:
    """Seconds of the request's own time that are left, after it waited for a thread."""
    if request.timeout is None:
        return None
    left = request.timeout - (time.perf_counter() - began)
    if left <= 0:
        raise StoreUnavailable(f"the request's {request.timeout:g} s were over before a thread could take it")
    return left
