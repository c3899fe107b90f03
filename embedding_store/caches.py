"""One byte budget over the caches of all tables of all releases in use.

A cache belongs to one release and can answer for no other. Of each model one release is cached, the newest that is
asked for or the one that was warmed last; others are still answered, without a cache. Every model that was ever
expected or asked for has an equal part of the budget: a part that depended on which caches live at the moment would
grow when one is dropped, and two models would throw each other out with every look-up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from embedding_store.cache import TableCache, full_bytes
from embedding_store.release import ReleaseManifest, TableInfo

# A replaced or older release gets the model's cache when the one that has it was not asked for this long (after a
# rollback that nobody warmed). Until then requests that straddle a switch cannot make the two throw each other out.
TAKEOVER_SECONDS = 5.0
MAX_BYPASSED = 16

TableCaches = Mapping[str, TableCache]


def divide(tables: Sequence[TableInfo], budget: int) -> dict[str, int]:
    """Bytes per table, at most `budget` in all: all of it where it fits, else in proportion to the tables' bytes,
    after the small tables (which would gain nothing from a fraction) got all of theirs."""
    need = {table.name: full_bytes(table) for table in tables}
    if sum(need.values()) <= budget:
        return need
    small = {name for name, size in need.items() if size <= budget // (4 * len(tables))}
    left = budget - sum(need[name] for name in small)
    large = sum(size for name, size in need.items() if name not in small)
    return {name: size if name in small else left * size // large for name, size in need.items()}


class ReleaseCache:
    def __init__(self, manifest: ReleaseManifest, budget: int, before: ReleaseCache | None = None) -> None:
        shares = divide(manifest.tables, budget)
        self.manifest = manifest
        self.tables: TableCaches = {
            table.name: TableCache(table, shares[table.name], None if before is None else before.tables[table.name])
            for table in manifest.tables
        }
        self.bytes = sum(cache.bytes for cache in self.tables.values())
        self.used = time.monotonic()


class CacheBudget:
    """Thread-safe."""

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"cache_bytes is {budget}; accepted: 0 (no cache) or more")
        self.budget = budget
        self._cached: dict[str, ReleaseCache] = {}  # by release, one per model
        self._bypass: dict[str, ReleaseCache] = {}  # by release, replaced ones: caches of no bytes that only count
        self._models: set[str] = set()  # that share the budget
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Allocated at this moment."""
        with self._lock:
            return sum(cache.bytes for cache in self._cached.values())

    def all(self) -> dict[str, TableCaches]:
        with self._lock:
            return {name: cache.tables for name, cache in (self._bypass | self._cached).items()}

    def expect(self, models: Iterable[str]) -> None:
        """Parts of the budget for these models before they come: the first to come would else get all of it, and lose
        what it was warmed with to the second."""
        with self._lock:
            self._models.update(models)

    def of(self, manifest: ReleaseManifest) -> TableCaches:
        """The caches that answer for this release; made on the first call."""
        cache = self._cached.get(manifest.name)
        if cache is None:
            cache = self._bypass.get(manifest.name)
            if self._may_claim(manifest, replaced=cache is not None):
                return self.claim(manifest)
            if cache is None:
                with self._lock:
                    cache = self._bypass.setdefault(manifest.name, ReleaseCache(manifest, 0))
        cache.used = time.monotonic()
        return cache.tables

    def claim(self, manifest: ReleaseManifest) -> TableCaches:
        """Gives the model's share of the budget to this release."""
        with self._lock:
            cached = self._cached.get(manifest.name)
            if cached is None:
                before = self._bypass.pop(manifest.name, None)
                self._models.add(manifest.model)
                share = self.budget // len(self._models)
                self._make_room(manifest, share)
                cached = self._cached[manifest.name] = ReleaseCache(manifest, share, before)
            return cached.tables

    def _make_room(self, manifest: ReleaseManifest, share: int) -> None:
        """What has to go goes before the new arrays are made, so that the budget holds at every moment. Another
        model's cache that is larger than its share goes too, and comes back smaller with that model's next look-up."""
        for name, cache in list(self._cached.items()):
            if cache.manifest.model == manifest.model or cache.bytes > share:
                del self._cached[name]
                self._bypass[name] = ReleaseCache(cache.manifest, 0, cache)
        while len(self._bypass) > MAX_BYPASSED:
            del self._bypass[next(iter(self._bypass))]

    def _may_claim(self, manifest: ReleaseManifest, *, replaced: bool) -> bool:
        """Whether the model's cache is free, idle, or an older release's while this one was never replaced."""
        with self._lock:
            holders = [cache for cache in self._cached.values() if cache.manifest.model == manifest.model]
        return all(
            time.monotonic() - holder.used > TAKEOVER_SECONDS
            or (not replaced and manifest.created >= holder.manifest.created)
            for holder in holders
        )
