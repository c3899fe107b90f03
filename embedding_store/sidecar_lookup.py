"""TR.LOOKUP in the sidecar: rows go from the cache straight into the reply's frame, at once in the event loop where
that is quick, else in a thread."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedding_store import resp
from embedding_store.batch import IdBatch
from embedding_store.errors import ProtocolError, StoreUnavailable
from embedding_store.lookup import ABSENT, STALE, UNAVAILABLE
from embedding_store.protocol import LookupRequest, ReplyLayout, decode_request, request_names
from embedding_store.release import ReleaseManifest
from embedding_store.served import Remainder, ServedLookup
from embedding_store.sidecar_releases import ServedReleases
from embedding_store.sidecar_stats import SidecarStats

# Larger requests (32,768 ids, or as many tables) take a thread whatever they hit: they would hold up the others.
_LARGE = 256 << 10
_MOST_PLANS = 1024  # kept; each for one list of tables, of which services have a few
_LONGEST_KEY = 16 << 10  # bytes: longer lists of names are worked out each time


@dataclass(frozen=True, slots=True)
class _Plan:
    """What follows from the names in a request. tables: int64 [t], places in the manifest."""

    release: str
    tables: NDArray[np.int64]
    layout: ReplyLayout


class _Answer(NamedTuple):
    """A reply under way. whole: what is sent; status: uint8 [n], the part of it that is counted."""

    plan: _Plan
    batch: IdBatch
    whole: bytearray
    out: NDArray[np.uint8]
    starts: NDArray[np.int64]
    status: NDArray[np.uint8]


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
        self._releases = releases
        self._threads = threads
        self._max_frame = max_frame
        self._stats = stats
        self._plans: dict[bytes, _Plan] = {}

    def answer(self, frame: bytearray) -> bytearray | Coroutine[None, None, bytearray]:
        """The reply, or the wait for it. Both raise what EmbeddingLookup.lookup raises, and ProtocolError."""
        began = time.perf_counter()
        request = decode_request(frame)
        plan = None if len(frame) > _LARGE else self._plans.get(request.key) or self._known_plan(request)
        if plan is None or plan.release not in self._releases.manifests:
            return self._in_thread(request, began, functools.partial(self._from_the_start, request, began))
        answer = self._prepared(plan, request)
        try:
            remainder = self._begin(answer)
        except StoreUnavailable:
            self._count_refused(request)
            raise
        if remainder is None:
            self._count(answer, began)
            return answer.whole
        return self._in_thread(request, began, functools.partial(_finish, answer, remainder, request, began))

    def _known_plan(self, request: LookupRequest) -> _Plan | None:
        """None where the release's manifest has to be read first."""
        release, tables = request_names(request)
        manifest = self._releases.manifests.get(release)
        return None if manifest is None else self._make_plan(request.key, manifest, tables)

    def _make_plan(self, key: bytes, manifest: ReleaseManifest, tables: tuple[str, ...]) -> _Plan:
        """Raises UnknownTable."""
        row_bytes = [manifest.table(table).row_bytes for table in tables]
        places = np.array([manifest.places[table] for table in tables], np.int64)
        plan = _Plan(manifest.name, places, ReplyLayout(manifest.name, row_bytes))
        if len(key) <= _LONGEST_KEY:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _prepared(self, plan: _Plan, request: LookupRequest) -> _Answer:
        places = plan.layout.places(request.counts)
        if places.bytes > self._max_frame:
            raise ProtocolError(
                f"the reply would have {places.bytes} bytes; at most {self._max_frame} are sent in one frame"
            )
        whole, start = resp.bulk_buffer(places.bytes)
        head = plan.layout.head(request.counts)
        whole[start : start + len(head)] = head
        out = np.frombuffer(whole, np.uint8, places.bytes, start)
        status = out[places.status : places.status + len(request.ids)]
        batch = IdBatch(plan.tables, np.array(request.counts, np.int64), request.ids)
        return _Answer(plan, batch, whole, out, np.array(places.starts, np.int64), status)

    def _begin(self, answer: _Answer) -> Remainder | None:
        return self._store.begin(answer.plan.release, answer.batch, answer.out, answer.starts, answer.status)

    async def _in_thread(self, request: LookupRequest, began: float, work: Callable[[], _Answer]) -> bytearray:
        stats = self._stats
        stats.offloaded += 1
        stats.waiting += 1
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except StoreUnavailable:
            self._count_refused(request)
            raise
        finally:
            stats.waiting -= 1
            if request.timeout is not None and time.perf_counter() - began > request.timeout:
                stats.late += 1
        self._count(answer, began)
        return answer.whole

    def _from_the_start(self, request: LookupRequest, began: float) -> _Answer:
        release, tables = request_names(request)
        manifest = self._releases.manifest(release, timeout=_left(request, began))
        plan = self._plans.get(request.key) or self._make_plan(request.key, manifest, tables)
        answer = self._prepared(plan, request)
        remainder = self._begin(answer)
        return answer if remainder is None else _finish(answer, remainder, request, began)

    def _count(self, answer: _Answer, began: float) -> None:
        stats, status = self._stats, answer.status.tobytes()
        absent, unavailable, stale = status.count(ABSENT), status.count(UNAVAILABLE), status.count(STALE)
        self._releases.used[answer.plan.release] = began
        stats.lookups += 1
        stats.ids += len(status)
        stats.absent += absent
        stats.unavailable += unavailable
        stats.stale += stale
        stats.degraded.record(len(status), unavailable + stale)
        stats.latency.record(time.perf_counter() - began)

    def _count_refused(self, request: LookupRequest) -> None:
        """A look-up that failed because rows could not be had: to readiness, all of them."""
        self._stats.degraded.record(len(request.ids), len(request.ids))


def _finish(answer: _Answer, remainder: Remainder, request: LookupRequest, began: float) -> _Answer:
    remainder(_left(request, began))
    return answer


def _left(request: LookupRequest, began: float) -> float | None:
    """Seconds of the request's own time, after it waited for a thread. Raises StoreUnavailable: none."""
    left = None if request.timeout is None else request.timeout - (time.perf_counter() - began)
    if left is not None and left <= 0:
        raise StoreUnavailable(f"the request's {request.timeout:g} s were over before a thread could take it")
    return left
