"""What a sidecar needs of the store it serves, beside the look-ups themselves.

`ServedStore` gives it for an `EmbeddingStore` (cache and backend), `memory.MemoryStore` for tables in memory.
"""

from __future__ import annotations

import functools
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import NodeStats
from embedding_store.batch import IdBatch
from embedding_store.lookup import EmbeddingLookup, LookupReply
from embedding_store.memmap import MemmapBackend
from embedding_store.release import ReleaseEntry, ReleaseManifest
from embedding_store.store import EmbeddingStore, Misses
from embedding_store.store_stats import TableCounts

QUICK = 0.002  # seconds; some hundred misses that are in the page cache take a tenth of it
_AVERAGED = 8  # fetches, roughly

# What is left of a look-up: takes the seconds it may last (None: no limit), raises StoreUnavailable.
Remainder = Callable[[float | None], None]


@dataclass(frozen=True, slots=True)
class ServedStats:
    """Counters since the store was opened, in distinct ids of a look-up; sizes in bytes."""

    address: str  # without a password
    hits: int  # distinct ids answered from the cache
    misses: int  # distinct ids asked of the backend
    cache_bytes: int  # allocated
    cache_capacity_bytes: int
    evictions: int = 0
    tables: Mapping[str, Mapping[str, TableCounts]] = field(default_factory=dict)  # by release, by table
    nodes: Sequence[NodeStats] = ()
    ids_waiting: int = 0  # misses that wait for a fetch at this moment
    ids_joined: int = 0  # misses that another look-up's fetch brought
    shed: int = 0  # look-ups that were turned away because too many ids waited


class ServedLookup(EmbeddingLookup):
    @abstractmethod
    def manifest(
        self, release: str | None = None, *, model: str | None = None, timeout: float | None = None
    ) -> ReleaseManifest:
        """As EmbeddingLookup has it; `timeout` in seconds, for a release that is named."""

    @property
    def policy_tables(self) -> frozenset[str]:
        """Tables that the policy for unavailable rows names, whether there are such tables or not."""
        return frozenset()

    @abstractmethod
    def releases(self) -> Sequence[ReleaseEntry]:
        """Every complete release, whatever its model. Raises StoreUnavailable."""

    @abstractmethod
    def active(self) -> Mapping[str, str]:
        """Model -> its active release. Raises StoreUnavailable."""

    @abstractmethod
    def warm(self, release: str) -> int:
        """Fills the cache from the tables' hot lists, most frequent ids first; returns how many rows it read."""

    def expect(self, releases: Collection[str]) -> None:
        """These are warmed next: what one of them loads is not to make room for the others. Raises StoreUnavailable."""

    def hold(self, owner: str, releases: Collection[str], seconds: float) -> None:
        """For the next `seconds` nobody is to remove these from the store. Raises StoreUnavailable."""

    def forget(self, release: str) -> None:
        """Of a release that is asked for no more."""

    @abstractmethod
    def stats(self) -> ServedStats: ...

    @abstractmethod
    def begin(
        self,
        release: str,
        batch: IdBatch,
        out: NDArray[np.uint8],
        starts: NDArray[np.int64],
        status: NDArray[np.uint8],
    ) -> Remainder | None:
        """A look-up whose `manifest` was read before, as far as it goes without waiting for a network.

        Rows of the k-th table of the batch go to `out` from starts[k] on, one per id as they come, repeated ones too;
        status has one byte per id. None where everything is written; else the rest, to be called in a thread that may
        wait. Raises UnknownRelease.
        """


class ServedStore(ServedLookup):
    """Owns the store: closing this closes it.

    Rows of mapped files are fetched at once as long as that is quick: the way to a thread and back would cost every
    look-up 0.1 ms more (scripts/bench/sidecar.py's look-up: 0.38 ms at once, 0.51 ms by a thread). Where pages have to
    come from the disk it is not quick, and goes to a thread too, as what comes over a network always does.
    """

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store
        self._mapped = isinstance(store.backend, MemmapBackend)
        self._fetch_seconds = 0.0  # moving average

    def manifest(
        self, release: str | None = None, *, model: str | None = None, timeout: float | None = None
    ) -> ReleaseManifest:
        return self._store.manifest(release, model=model, timeout=timeout)

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        return self._store.lookup(release, ids, timeout=timeout)

    def begin(
        self,
        release: str,
        batch: IdBatch,
        out: NDArray[np.uint8],
        starts: NDArray[np.int64],
        status: NDArray[np.uint8],
    ) -> Remainder | None:
        misses = self._store.begin(release, batch, out, starts, status)
        if misses is None:
            return None
        rest = functools.partial(self._finish, misses)
        if self._mapped and self._fetch_seconds < QUICK:
            rest(None)
            return None
        return rest

    def _finish(self, misses: Misses, timeout: float | None) -> None:
        began = time.perf_counter()
        try:
            self._store.finish(misses, timeout=timeout)
        finally:
            self._fetch_seconds += (time.perf_counter() - began - self._fetch_seconds) / _AVERAGED

    @property
    def policy_tables(self) -> frozenset[str]:
        return self._store.policy_tables

    def releases(self) -> Sequence[ReleaseEntry]:
        active = set(self.active().values())
        return [
            ReleaseEntry(name, manifest.model, manifest.version, manifest.created, name in active)
            for name, manifest in sorted(self._store.backend.releases().items())
        ]

    def active(self) -> Mapping[str, str]:
        return {model: history[-1] for model, history in self._store.backend.histories().items() if history}

    def warm(self, release: str) -> int:
        return sum(self._store.warm(release).values())

    def expect(self, releases: Collection[str]) -> None:
        self._store.expect(releases)

    def hold(self, owner: str, releases: Collection[str], seconds: float) -> None:
        self._store.backend.pin(owner, releases, seconds)

    def forget(self, release: str) -> None:
        self._store.forget(release)

    def stats(self) -> ServedStats:
        found = self._store.stats()
        return ServedStats(
            found.address,
            found.total("hits"),
            found.total("misses"),
            found.cache_bytes,
            found.cache_budget,
            found.total("evictions"),
            found.releases,
            found.nodes,
            found.waiting,
            found.total("joined"),
            found.total("shed"),
        )

    def close(self) -> None:
        self._store.close()
