"""TR.LOOKUP in the sidecar: at once in the event loop where that is quick, else in a thread."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from embedding_store import resp
from embedding_store.errors import ProtocolError, StoreError, StoreUnavailable
from embedding_store.lookup import ABSENT, UNAVAILABLE, LookupReply
from embedding_store.protocol import LookupRequest, decode_request, reply_bytes, status_of, write_reply
from embedding_store.release import ReleaseManifest
from embedding_store.served import Remainder, ServedLookup
from embedding_store.sidecar_stats import SidecarStats

_log = logging.getLogger(__name__)

# Larger requests (32,768 ids, some 5 ms) take a thread whatever they hit: the kernels there leave the loop alone.
_LARGE = 256 << 10


@dataclass(frozen=True, slots=True)
class _Answer:
    """An encoded reply, and what it counts for."""

    reply: memoryview
    ids: int
    absent: int
    unavailable: int


class Lookups:
    def __init__(self, store: ServedLookup, threads: ThreadPoolExecutor, max_frame: int, stats: SidecarStats) -> None:
        self._store = store
        self._threads = threads
        self._max_frame = max_frame
        self._stats = stats
        self._manifests: dict[str, ReleaseManifest] = {}  # a release never changes, so neither do these
        self._row_bytes: dict[str, dict[str, int]] = {}
        self._warmed: dict[str, int] = {}

    def warm(self, release: str, *, take_over: bool = True) -> int:
        """Loads the hot rows of `release`; returns how many. May wait for a network."""
        manifest = self.remember(self._store.manifest(release))
        self._warmed[release] = self._store.warm(release, take_over=take_over)
        # One look-up, so that kernels are compiled and files mapped before the first client waits for it.
        some = np.array([0, -1], np.int64)
        self._store.lookup(release, {table.name: some for table in manifest.tables})
        return self._warmed[release]

    def remember(self, manifest: ReleaseManifest) -> ReleaseManifest:
        self._row_bytes[manifest.name] = {table.name: table.row_bytes for table in manifest.tables}
        self._manifests[manifest.name] = manifest
        return manifest

    def releases(self) -> dict[str, str]:
        """What INFO says of each release that was asked for."""
        return {
            name: f"tables={len(manifest.tables)},rows={sum(table.rows for table in manifest.tables)},"
            f"bytes={sum(table.bytes for table in manifest.tables)},warmed_rows={self._warmed.get(name, 0)}"
            for name, manifest in sorted(self._manifests.items())
        }

    def answer(self, frame: bytearray) -> memoryview | Coroutine[None, None, memoryview]:
        """The reply, or the wait for it. Both raise what EmbeddingLookup.lookup raises, and ProtocolError."""
        began = time.perf_counter()
        request = decode_request(frame)
        manifest = self._manifests.get(request.release)
        remainder: Remainder = functools.partial(self._from_the_start, request)
        if manifest is not None and manifest.name not in self._warmed:
            self._warm_meanwhile(manifest.name)
        if manifest is not None and len(frame) <= _LARGE:
            self._check(request, manifest)
            found = self._store.begin(request.release, request.ids)
            if isinstance(found, LookupReply):
                return self._count(_encode(found), began)
            remainder = found
        self._stats.offloaded += 1
        return self._in_thread(request, remainder, began)

    def _warm_meanwhile(self, release: str) -> None:
        """A release that came while this process ran: its first look-up gives it the cache, which is empty yet, unless
        it is an older one beside the one that is in use."""
        self._warmed[release] = 0  # until it is done, and once only
        warming = self._threads.submit(self.warm, release, take_over=False)
        warming.add_done_callback(functools.partial(_report_warming, release))

    def _from_the_start(self, request: LookupRequest, timeout: float | None) -> LookupReply:
        manifest = self._manifests.get(request.release) or self.remember(self._store.manifest(request.release))
        self._check(request, manifest)
        return self._store.lookup(request.release, request.ids, timeout=timeout)

    async def _in_thread(self, request: LookupRequest, remainder: Remainder, began: float) -> memoryview:
        def work() -> _Answer:
            return _encode(remainder(_left(request, began)))

        return self._count(await asyncio.get_running_loop().run_in_executor(self._threads, work), began)

    def _check(self, request: LookupRequest, manifest: ReleaseManifest) -> None:
        widths = self._row_bytes[manifest.name]
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
        stats.latency.record(time.perf_counter() - began)
        return answer.reply


def _report_warming(release: str, warming: Future[int]) -> None:
    error = warming.exception()
    if error is None:
        _log.info("%s: warmed %d rows", release, warming.result())
    elif isinstance(error, StoreError):
        _log.warning("%s was not warmed: %s", release, error)
    else:
        _log.error("%s was not warmed", release, exc_info=error)


def _encode(found: LookupReply) -> _Answer:
    shapes = [(len(table.index), table.rows.shape[1]) for table in found.tables.values()]
    whole, payload = resp.bulk_buffer(reply_bytes(found.release, shapes))
    write_reply(found, payload)
    asked = sum(count for count, _ in shapes)
    status = status_of(payload, asked).tobytes()
    return _Answer(whole, asked, status.count(ABSENT), status.count(UNAVAILABLE))


def _left(request: LookupRequest, began: float) -> float | None:
    """Seconds of the request's own time that are left, after it waited for a thread."""
    if request.timeout is None:
        return None
    left = request.timeout - (time.perf_counter() - began)
    if left <= 0:
        raise StoreUnavailable(f"the request's {request.timeout:g} s were over before a thread could take it")
    return left
