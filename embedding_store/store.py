"""EmbeddingStore: dedupe → cache → one fetch of the misses, for all tables of a request at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.backend import Backend
from embedding_store.batch import batch_of, row_starts
from embedding_store.cache import TableStats, default_row
from embedding_store.caches import CacheBudget
from embedding_store.dedupe import dedupe
from embedding_store.errors import UnknownRelease
from embedding_store.lookup import ABSENT, FOUND, EmbeddingLookup, LookupReply, TableRows
from embedding_store.release import ReleaseManifest, TableInfo

_WARM_CHUNK = 8192  # ids per fetch


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Since the store was opened. Ratios count distinct ids of a look-up, see `cache.TableStats`."""

    address: str
    lookups: int
    ids: int  # asked, duplicates and all
    cache_budget: int  # bytes
    cache_bytes: int  # allocated
    releases: Mapping[str, Mapping[str, TableStats]]  # by release, by table

    def total(self, counter: str) -> int:
        """Sum over releases and tables of one of TableStats' numbers."""
        return sum(int(getattr(table, counter)) for tables in self.releases.values() for table in tables.values())

    @property
    def hit_rate(self) -> float:
        """0 … 1; 0 before the first look-up."""
        hits = self.total("hits")
        return hits / max(1, hits + self.total("misses"))


@dataclass(frozen=True, slots=True)
class _Pending:
    """One table of a look-up under way: which of its distinct ids the cache does not have."""

    unique: NDArray[np.int64]
    misses: NDArray[np.int64]
    reply: TableRows


@dataclass(frozen=True, slots=True)
class Probed:
    """A look-up between its halves. Where `missing` (distinct ids by table) is empty, `complete` waits for nobody."""

    release: str
    pending: Mapping[str, _Pending]
    missing: Mapping[str, NDArray[np.int64]]


class _Tables:
    """What a look-up needs of a release, by table name."""

    def __init__(self, manifest: ReleaseManifest) -> None:
        self.manifest = manifest
        self.infos = {table.name: table for table in manifest.tables}
        self.defaults = {table.name: default_row(table) for table in manifest.tables}

    def info(self, table: str) -> TableInfo:
        return self.infos.get(table) or self.manifest.table(table)  # the latter raises UnknownTable


class EmbeddingStore(EmbeddingLookup):
    """A backend and, in front of it, a cache of at most `cache_bytes` over all tables and releases (0: none).

    Thread-safe. Owns the backend: closing the store closes it.
    """

    def __init__(self, backend: Backend, *, cache_bytes: int = 0) -> None:
        self.backend = backend
        self._budget = CacheBudget(cache_bytes)
        self._releases: dict[str, _Tables] = {}
        self._lookups = 0
        self._ids = 0
        self._lock = threading.Lock()

    def manifest(self, release: str | None = None, *, model: str | None = None) -> ReleaseManifest:
        return self._tables(self._active(model) if release is None else release).manifest

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """See EmbeddingLookup. An id of any value may be asked; the default row of an absent one has status ABSENT."""
        return self.complete(self.probe(release, ids), timeout=timeout)

    def probe(self, release: str, ids: Mapping[str, NDArray[np.int64]]) -> Probed:
        """The part of a look-up that needs no backend, once the release's manifest was read."""
        tables = self._tables(release)
        caches = self._budget.of(tables.manifest)
        pending: dict[str, _Pending] = {}
        for name, wanted in ids.items():
            unique, index = dedupe(_checked(name, wanted))
            rows = np.empty((len(unique), tables.info(name).row_bytes), np.uint8)
            status = np.empty(len(unique), np.uint8)
            misses = caches[name].probe(unique, rows, status)
            pending[name] = _Pending(unique, misses, TableRows(rows, status, index))
        missing = {name: table.unique[table.misses] for name, table in pending.items() if len(table.misses)}
        return Probed(release, pending, missing)

    def complete(self, probed: Probed, *, timeout: float | None = None) -> LookupReply:
        """The other part: one fetch of what the cache did not have. Raises StoreUnavailable."""
        release, pending, missing = probed.release, probed.pending, probed.missing
        if missing:
            tables = self._tables(release)
            caches = self._budget.of(tables.manifest)
            fetched = self._fetch(release, missing, timeout)
            for name, (rows, found) in fetched.items():
                table = pending[name]
                absent = _fill(table.reply.rows, table.reply.status, table.misses, rows, found, tables.defaults[name])
                caches[name].insert(missing[name], rows, found)
                caches[name].count_absent(absent)
        with self._lock:
            self._lookups += 1
            self._ids += sum(len(table.reply.index) for table in pending.values())
        return LookupReply(release, {name: table.reply for name, table in pending.items()})

    def _fetch(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], timeout: float | None
    ) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
        manifest = self._tables(release).manifest
        batch = batch_of(manifest, ids)
        fetched = self.backend.fetch(release, batch, timeout=timeout)
        if fetched.error is not None:
            raise fetched.error
        widths = np.array([table.row_bytes for table in manifest.tables], np.int64)
        starts = row_starts(batch, widths)
        ends = np.cumsum(batch.counts)
        return {
            name: (
                fetched.rows[starts[i] : starts[i + 1]].reshape(len(wanted), -1),
                fetched.status[ends[i] - len(wanted) : ends[i]] == FOUND,
            )
            for i, (name, wanted) in enumerate(ids.items())
        }

    def expect(self, models: Iterable[str]) -> None:
        """Divides the cache among these models from now on, whichever is warmed or asked for first."""
        self._budget.expect(models)

    def warm(self, release: str, *, take_over: bool = True) -> dict[str, int]:
        """Makes the cache ready for `release` before it gets traffic: its most frequent ids, as many as fit.

        Returns rows loaded per table. Each table has a part of the budget in proportion to its bytes. `take_over`: also
        where another release of the model has the cache and is in use; otherwise nothing is loaded then.
        Raises UnknownRelease, StoreUnavailable.
        """
        manifest = self._tables(release).manifest
        caches = self._budget.claim(manifest) if take_over else self._budget.of(manifest)
        loaded = {}
        for name, cache in caches.items():
            hot = self.backend.hot_ids(release, name)[: cache.capacity]
            for start in range(0, len(hot), _WARM_CHUNK):
                chunk = hot[start : start + _WARM_CHUNK]
                rows, found = self._fetch(release, {name: chunk}, None)[name]
                cache.insert(chunk[found], rows[found], found[found], only_empty=True)
            loaded[name] = cache.stats().entries
        return loaded

    def stats(self) -> StoreStats:
        releases = {
            release: {name: cache.stats() for name, cache in caches.items()}
            for release, caches in self._budget.all().items()
        }
        return StoreStats(
            self.backend.address, self._lookups, self._ids, self._budget.budget, self._budget.bytes, releases
        )

    def close(self) -> None:
        self.backend.close()

    def _tables(self, release: str) -> _Tables:
        known = self._releases.get(release)
        if known is None:  # a release never changes, so one reading lasts
            known = self._releases[release] = _Tables(self.backend.manifest(release))
        return known

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


def _checked(table: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise ValueError(f"table {table!r}: ids must be int64 [n], not {ids.dtype} {list(ids.shape)}")
    return np.ascontiguousarray(ids)


@njit(cache=True, nogil=True)
def _fill(rows, status, places, fetched, found, default):  # type: ignore[no-untyped-def]
    """Puts what was fetched where the cache left gaps; returns how many of them are absent."""
    absent = 0
    for i in range(len(places)):
        source = fetched[i] if found[i] else default
        target = rows[places[i]]
        for byte in range(len(default)):
            target[byte] = source[byte]
        status[places[i]] = FOUND if found[i] else ABSENT
        absent += int(not found[i])
    return absent
