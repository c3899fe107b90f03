"""What a cache of a given size answers, and what size answers so much, out of the counts that a bundle keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding_store.access_counts import read_counts
from embedding_store.cache_layout import plan as plan_sets
from embedding_store.cache_set import WAYS, set_bytes
from embedding_store.hit_rates import Popularity, ideal, lru, popularity, s3fifo, together
from embedding_store.release import ReleaseManifest

# Resident beside the cache: 90 MiB of its own, and of libraries' files that it shares with other processes. What a
# memory-mapped store keeps in memory comes on top; the kernel gives that up when memory is short.
SIDECAR_BYTES = 190 << 20

# ideal: what is asked for most stays, and nothing else comes in.
POLICIES: Mapping[str, Callable[[Popularity, float], NDArray[np.float64]]] = {
    "lru": lru, "s3fifo": s3fifo, "ideal": ideal,
}  # fmt: skip

STEP_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class HitRate:
    """Of one policy; shares are 0 … 1."""

    raw: float  # of all ids that requests name, repeats within a request and all
    distinct: float  # of the distinct ids of each request
    fetched_per_request: float  # rows that the store is asked for
    tables: Mapping[str, float]  # raw, of the tables that are asked for at all


@dataclass(frozen=True, slots=True)
class CachePlan:
    bytes: int  # --cache-size
    sidecar_bytes: int  # resident
    entries: int  # rows that find a place
    rates: Mapping[str, HitRate]  # by policy, see POLICIES


class CacheForecast:
    """Of one release. Ids that a table does not have are not counted, and take no place here."""

    def __init__(self, manifest: ReleaseManifest, requests: int, popular: Mapping[str, Popularity]) -> None:
        """`popular` of every table, in `requests` requests."""
        self._manifest = manifest
        self._requests = requests
        self._popular = popular
        self._sharing: dict[int, list[str]] = defaultdict(list)  # tables whose rows are equally wide share the entries
        for table in manifest.tables:
            self._sharing[table.row_bytes].append(table.name)

    def at(self, cache_bytes: int) -> CachePlan:
        sets = plan_sets([self._manifest], cache_bytes)
        used = sum(count * set_bytes(width) for width, count in sets.items())
        rates = {policy: self._rate(policy, sets) for policy in POLICIES}
        return CachePlan(cache_bytes, SIDECAR_BYTES + used, WAYS * sum(sets.values()), rates)

    def bytes_for(self, share: float, policy: str) -> int:
        """The smallest cache, in steps of STEP_BYTES, whose raw hit rate is `share`, 0 … 1."""
        low, high = 0, 1
        while self._raw(high, policy) < share:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._raw(middle, policy) < share else (low, middle)
        return high * STEP_BYTES

    def _raw(self, steps: int, policy: str) -> float:
        return self._rate(policy, plan_sets([self._manifest], steps * STEP_BYTES)).raw

    def _rate(self, policy: str, sets: Mapping[int, int]) -> HitRate:
        names, hits, missed, asked = {}, {}, 0.0, 0.0
        for width, sharing in self._sharing.items():
            tables = [self._popular[name] for name in sharing]
            ends = np.cumsum([len(table.ids) for table in tables])
            present = np.split(POLICIES[policy](together(tables), WAYS * sets[width]), ends[:-1])
            for name, table, held in zip(sharing, tables, present, strict=True):
                names[name] = float((table.ids * table.rate * table.repeats).sum())
                hits[name] = float((table.ids * table.rate * table.repeats * held).sum())
                missed += float((table.ids * table.rate * (1 - held)).sum())
                asked += table.asked
        return HitRate(
            raw=sum(hits.values()) / sum(names.values()),
            distinct=1 - missed / asked,
            fetched_per_request=missed / self._requests,
            tables={name: hits[name] / named for name, named in names.items() if named},
        )


def read_forecast(bundle: Path, manifest: ReleaseManifest) -> CacheForecast | None:
    """None where the bundle has no counts of one of its tables, or counts of nothing. Raises InvalidRelease."""
    counts = {table.name: read_counts(bundle / "tables", table) for table in manifest.tables}
    popular = {
        table.name: popularity(found, table.rows)
        for table in manifest.tables
        if (found := counts[table.name]) is not None
    }
    requests = max((found.requests for found in counts.values() if found is not None), default=0)
    if len(popular) < len(manifest.tables) or not any(table.asked for table in popular.values()):
        return None
    return CacheForecast(manifest, requests, popular)
