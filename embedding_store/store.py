"""EmbeddingStore: dedupe → cache → one fetch of the misses → stand-ins for what cannot be had; all tables at once."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import Backend
from embedding_store.batch import FetchedRows, IdBatch, batch_of, place_rows, row_starts
from embedding_store.dedupe import dedupe_tables
from embedding_store.degrade import DegradePolicy
from embedding_store.errors import StoreUnavailable, UnknownRelease
from embedding_store.fallback import CachedRelease, Degraded, Fallback
from embedding_store.hot_cache import HotCache
from embedding_store.lookup import FOUND, UNAVAILABLE, EmbeddingLookup, LookupReply, TableRows
from embedding_store.misses import MissQueue
from embedding_store.release import ReleaseManifest
from embedding_store.release_view import ReleaseView
from embedding_store.store_stats import RowCounts, StoreStats, table_counts, totals
from embedding_store.warming import warm

_log = logging.getLogger(__name__)
_LOG_SECONDS = 10.0  # between two lines about degraded look-ups


class _Served(CachedRelease):
    """A release in use."""

    def __init__(self, manifest: ReleaseManifest, backend: Backend, cache: HotCache, policy: DegradePolicy) -> None:
        super().__init__(ReleaseView(manifest), cache.tables(manifest))
        self.queue = MissQueue(self._fetch, self.view.widths)
        self.fallback = Fallback(policy, cache, self)
        self.counts = RowCounts(len(manifest.tables))
        self._backend = backend
        self._cache = cache

    def fetch(self, batch: IdBatch, timeout: float | None) -> FetchedRows:
        """Where a fetch waits for nobody, there is nothing to gain from joining it with others."""
        return self.queue.fetch(batch, timeout) if self._backend.waits else self._fetch(batch, timeout)

    def _fetch(self, batch: IdBatch, timeout: float | None) -> FetchedRows:
        fetched = self._backend.fetch(self.view.manifest.name, batch, timeout=timeout)
        self._cache.insert(self.cached, batch, fetched.rows, fetched.status)
        return fetched


@dataclass(frozen=True, slots=True)
class Misses:
    """A look-up between its halves: what the cache did not have, and where its rows go (see `EmbeddingStore.begin`)."""

    serving: _Served  # the very one that was asked, though its release may be forgotten meanwhile
    batch: IdBatch
    out: NDArray[np.uint8]
    starts: NDArray[np.int64]
    status: NDArray[np.uint8]
    positions: NDArray[np.int64]


class EmbeddingStore(EmbeddingLookup):
    """A backend and, in front of it, a cache of at most `cache_bytes` over all tables and releases (0: none).

    Thread-safe. Owns the backend: closing the store closes it.
    """

    def __init__(
        self, backend: Backend, *, cache_bytes: int = 0, degrade: DegradePolicy | None = None, policy: str = "s3fifo"
    ) -> None:
        """policy: which entries the cache keeps, see `HotCache`. degrade: see there; strict where None."""
        self.backend = backend
        self._cache = HotCache(cache_bytes, policy)
        self._degrade = degrade or DegradePolicy()
        self._served: dict[str, _Served] = {}
        self._forgotten: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._logged = -_LOG_SECONDS

    @property
    def policy_tables(self) -> frozenset[str]:
        """Tables that the policy for unavailable rows names."""
        return frozenset(self._degrade.tables)

    def manifest(
        self, release: str | None = None, *, model: str | None = None, timeout: float | None = None
    ) -> ReleaseManifest:
        """timeout: seconds for reading it; which release is active is asked in the store's own time."""
        return self._serving(self._active(model) if release is None else release, timeout).view.manifest

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """See EmbeddingLookup. An id of any value may be asked; the default row of an absent one has status ABSENT."""
        began = time.monotonic()
        serving = self._serving(release, timeout)
        asked = batch_of(serving.view.manifest, ids)
        unique, counts, index = dedupe_tables(asked.ids, asked.counts)
        batch = IdBatch(asked.tables, counts, unique)
        starts = row_starts(batch, serving.view.widths)
        out, status = np.empty(starts[-1], np.uint8), np.empty(len(unique), np.uint8)
        misses = self.begin(release, batch, out, starts, status)
        serving.counts.asked(asked, batch, index, None if misses is None else misses.positions)
        if misses is not None:
            self.finish(misses, timeout=None if timeout is None else max(0.0, timeout - (time.monotonic() - began)))
        tables, first, first_asked = {}, 0, 0
        for k, (name, wanted) in enumerate(ids.items()):
            last, width = first + int(counts[k]), serving.view.widths[asked.tables[k]]
            rows = out[starts[k] : starts[k + 1]].reshape(-1, width)
            tables[name] = TableRows(rows, status[first:last], index[first_asked : first_asked + len(wanted)])
            first, first_asked = last, first_asked + len(wanted)
        return LookupReply(release, tables)

    def begin(
        self,
        release: str,
        batch: IdBatch,
        out: NDArray[np.uint8],
        starts: NDArray[np.int64],
        status: NDArray[np.uint8],
    ) -> Misses | None:
        """The part of a look-up that needs no backend, once the release's manifest was read.

        The i-th id of the batch's k-th table gets its row at out[starts[k] + i · row_bytes …] (uint8, flat) and its
        status in `status`, uint8 [n]. None: that was all. Ids may repeat. Raises UnknownRelease, StoreUnavailable.
        """
        serving = self._serving(release)
        positions = self._cache.probe(serving.cached, batch, out, starts, status)
        if len(positions):
            return Misses(serving, batch, out, starts, status, positions)
        serving.counts.answered(batch, status)
        return None

    def finish(self, misses: Misses, *, timeout: float | None = None) -> None:
        """The other part: one fetch of what the cache did not have, `timeout` in seconds.

        Raises StoreUnavailable where the policy allows no stand-in for a row that cannot be fetched.
        """
        serving = misses.serving
        wanted, widths = misses.batch.select(misses.positions), serving.view.widths
        fetched = serving.fetch(wanted, timeout)
        found = place_rows(
            fetched.rows, fetched.status, wanted.tables, wanted.counts, widths,
            misses.positions, misses.batch.counts, misses.starts, misses.out, misses.status,
        )  # fmt: skip
        if found < len(wanted.ids):
            missing = misses.positions[fetched.status != FOUND]
            serving.view.fill_defaults(misses.batch, missing, misses.out, misses.starts)
        if fetched.error is not None:
            unavailable = misses.positions[fetched.status == UNAVAILABLE]
            lookup = Degraded(misses.batch, misses.out, misses.starts, misses.status, fetched.error)
            self._log_degraded(misses, len(unavailable), fetched.error)
            serving.fallback.stand_in(lookup, unavailable, self._previous(serving))
        serving.counts.answered(misses.batch, misses.status)

    def _log_degraded(self, misses: Misses, unavailable: int, error: StoreUnavailable) -> None:
        """Now and then: a store that is away would fill the log at the rate of the traffic."""
        now, release = time.monotonic(), misses.serving.view.manifest.name
        if now - self._logged > _LOG_SECONDS:
            self._logged = now
            _log.warning("%s: %d of %d ids unavailable: %s", release, unavailable, len(misses.batch.ids), error)

    # ---- releases

    def expect(self, releases: Iterable[str]) -> None:
        """Divides the cache for these releases at once, so that the first to be warmed does not lose rows to the next.

        Raises UnknownRelease, StoreUnavailable.
        """
        self._cache.expect([self.backend.manifest(release) for release in releases])

    def warm(self, release: str) -> dict[str, int]:
        """Makes the cache ready for `release` before it gets traffic: its most frequent ids, as many as fit.

        Returns rows loaded per table. Raises UnknownRelease, StoreUnavailable.
        """
        serving = self._serving(release)
        return warm(self.backend, self._cache, serving.view.manifest, serving.cached)

    def forget(self, release: str) -> None:
        """Of a release that is asked for no more; whoever asks all the same is answered."""
        cached = self._cache.stats().releases.get(release, {})
        with self._lock:  # over both, or what is asked meanwhile would be served without the cache from then on
            serving = self._served.pop(release, None)
            self._cache.forget(release)
            if serving is not None:
                counts = table_counts(serving.view.manifest, serving.counts, cached)
                self._forgotten.update(totals(counts.values(), serving.queue.stats))
        self.backend.forget(release)

    def stats(self) -> StoreStats:
        cached = self._cache.stats()
        with self._lock:
            served, forgotten = dict(self._served), dict(self._forgotten)
        tables = {
            name: table_counts(serving.view.manifest, serving.counts, cached.releases.get(name, {}))
            for name, serving in served.items()
        }
        return StoreStats(
            self.backend.address,
            cached.budget,
            cached.bytes,
            tables,
            {name: serving.queue.stats for name, serving in served.items()},
            forgotten,
            sum(serving.queue.waiting for serving in served.values()),
            tuple(self.backend.nodes()),
        )

    def close(self) -> None:
        self.backend.close()

    def _serving(self, release: str, timeout: float | None = None) -> _Served:
        known = self._served.get(release)
        if known is not None:
            return known
        manifest = self.backend.manifest(release, timeout=timeout)  # a release never changes, so one reading lasts
        with self._lock:
            known = self._served.get(release)
            if known is None:
                known = self._served[release] = _Served(manifest, self.backend, self._cache, self._degrade)
        return known

    def _previous(self, serving: _Served) -> _Served | None:
        """The release of the same model that came into use before this one; the store need not be reachable."""
        before = None
        for other in list(self._served.values()):
            if other is serving:
                return before
            if other.view.manifest.model == serving.view.manifest.model:
                before = other
        return None  # forgotten meanwhile: those that are left may be later ones

    def _active(self, model: str | None) -> str:
        """The active release of `model`, or, where None, of the only model that has one."""
        address = self.backend.address
        if model is not None:
            release = self.backend.active(model)
            if release is None:
                raise UnknownRelease(f"no release of model {model!r} is active in {address}")
            return release
        active = sorted(history[-1] for history in self.backend.histories().values() if history)
        if not active:
            raise UnknownRelease(f"no release is active in {address}")
        if len(active) > 1:
            raise UnknownRelease(f"{address} has several active releases, name one: {', '.join(active)}")
        return active[0]
