"""Stand-ins for rows that could not be fetched, as `degrade.DegradePolicy` orders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import IdBatch, copy_rows, row_offsets, row_starts
from embedding_store.cache_owners import CachedTables
from embedding_store.degrade import DegradePolicy, Steps
from embedding_store.errors import StoreUnavailable
from embedding_store.hot_cache import HotCache
from embedding_store.lookup import FOUND, STALE, UNAVAILABLE
from embedding_store.release_view import ReleaseView


@dataclass(frozen=True, slots=True)
class Degraded:
    """A look-up with rows that could not be fetched, and where its rows go (see `EmbeddingStore.begin`).

    Their status is UNAVAILABLE and they hold the default row, both of which a stand-in overwrites.
    """

    batch: IdBatch
    out: NDArray[np.uint8]
    starts: NDArray[np.int64]
    status: NDArray[np.uint8]
    error: StoreUnavailable  # why


@dataclass(eq=False)
class CachedRelease:
    view: ReleaseView
    cached: CachedTables


class Fallback:
    """For one release."""

    def __init__(self, policy: DegradePolicy, cache: HotCache, release: CachedRelease) -> None:
        self._cache = cache
        self._release = release
        self._max_default_share = policy.max_default_share
        by_steps: dict[Steps, list[int]] = {}
        for place, table in enumerate(release.view.manifest.tables):
            by_steps.setdefault(policy.of(table.name), []).append(place)
        self._by_steps = {steps: np.array(places, np.int64) for steps, places in by_steps.items()}

    def stand_in(self, lookup: Degraded, positions: NDArray[np.int64], previous: CachedRelease | None) -> None:
        """positions: int64 [k] ascending, of the rows concerned. Raises StoreUnavailable where the policy says so."""
        place_of = np.repeat(lookup.batch.tables, lookup.batch.counts)
        defaults = 0
        for steps, places in self._by_steps.items():
            left = positions[np.isin(place_of[positions], places)]
            for step in steps:
                if step == "cache":
                    left = self._from_cache(lookup, left, self._release)
                elif step == "previous" and previous is not None:
                    left = self._from_cache(lookup, left, previous)
                elif step == "default":
                    defaults += len(left)
                    left = left[:0]
            if len(left):
                raise StoreUnavailable(self._refusal(lookup, left, f"policy {','.join(steps)}"))
        if defaults > self._max_default_share * len(lookup.batch.ids):
            limit = f"at most {100 * self._max_default_share:g}% may be default rows"
            raise StoreUnavailable(self._refusal(lookup, positions, limit))

    def _refusal(self, lookup: Degraded, left: NDArray[np.int64], reason: str) -> str:
        counts = lookup.batch.select(left).counts
        names = self._release.view.manifest.tables
        tables = ", ".join(
            f"{names[place].name!r} {count}"
            for place, count in zip(lookup.batch.tables.tolist(), counts.tolist(), strict=True)
            if count
        )
        return f"{lookup.error}; of {len(lookup.batch.ids)} ids unavailable: {tables} ({reason})"

    def _from_cache(self, lookup: Degraded, left: NDArray[np.int64], release: CachedRelease) -> NDArray[np.int64]:
        """Takes what the cache has of `release`; returns the positions that are left over."""
        stale = release is not self._release
        left, beyond = self._shared(lookup.batch, left, release.view) if stale else (left, left[:0])
        mine = lookup.batch.select(left)
        theirs = IdBatch(self._translated(mine.tables, release.view), mine.counts, mine.ids) if stale else mine
        starts = row_starts(mine, self._release.view.widths)
        rows, status = np.empty(starts[-1], np.uint8), np.full(len(left), UNAVAILABLE, np.uint8)
        self._cache.probe(release.cached, theirs, rows, starts, status, record=False)
        if stale:  # an id that the earlier release did not have says nothing about this one
            status[status != FOUND] = UNAVAILABLE
        widths = self._release.view.widths
        batch = lookup.batch
        copy_rows(
            rows, status, row_offsets(mine.tables, mine.counts, widths, starts), np.arange(len(left)),
            mine.tables, mine.counts, widths,
            left, lookup.out, lookup.status, row_offsets(batch.tables, batch.counts, widths, lookup.starts),
        )  # fmt: skip
        if stale:
            lookup.status[left[status == FOUND]] = STALE
        return np.sort(np.concatenate((left[status == UNAVAILABLE], beyond)))

    def _shared(
        self, batch: IdBatch, left: NDArray[np.int64], other: ReleaseView
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(positions of tables that the other release has in the same form, the rest)."""
        shared = np.repeat(self._translated(batch.tables, other) >= 0, batch.counts)[left]
        return left[shared], left[~shared]

    def _translated(self, places: NDArray[np.int64], other: ReleaseView) -> NDArray[np.int64]:
        """Places of the same tables in another release; -1 where it has none, or one with other rows."""
        return np.array([_place_in(other, self._release.view, place) for place in places.tolist()], np.int64)


def _place_in(other: ReleaseView, view: ReleaseView, place: int) -> int:
    table = view.manifest.tables[place]
    there = other.places.get(table.name, -1)
    if there < 0:
        return -1
    same: Sequence[str] = ("codec", "dim", "ids")
    return there if all(getattr(other.manifest.tables[there], key) == getattr(table, key) for key in same) else -1
