"""HotCache: the rows that are asked for most, of all tables of all releases in use, in one array of a chosen size.

Rows lie encoded in sets of 8 ways (`cache_set`), entries of all tables with rows of one width in the same sets; which
of them stay is the policy's decision (`cache_policy`). Nothing is allocated per row. Look-ups take no lock: they notice
when a set was written while they read it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import IdBatch
from embedding_store.cache_gate import Gate
from embedding_store.cache_insert import insert
from embedding_store.cache_layout import Layout, plan
from embedding_store.cache_owners import CachedTables, Owners, TableStats
from embedding_store.cache_policy import POLICIES
from embedding_store.cache_probe import probe
from embedding_store.release import ReleaseManifest


@dataclass(frozen=True, slots=True)
class CacheStats:
    budget: int  # bytes
    bytes: int  # of it, what the sets take
    capacity: int  # entries, of all tables together
    releases: Mapping[str, Mapping[str, TableStats]]  # by release, by table


class HotCache:
    """Thread-safe. `budget` in bytes bounds ids, rows and what is noted of them; 0 or too little: a cache of nothing.

    policy: "s3fifo", or "lru".
    """

    def __init__(self, budget: int, policy: str = "s3fifo") -> None:
        if budget < 0:
            raise ValueError(f"the cache's budget is {budget} bytes; accepted: 0 (no cache) or more")
        if policy not in POLICIES:
            raise ValueError(f"cache policy {policy!r} is unknown; accepted: {', '.join(sorted(POLICIES))}")
        self.budget = budget
        self._policy = POLICIES[policy]
        self._layout = Layout(budget)
        self._owners = Owners()
        self._live: dict[str, CachedTables] = {}  # by release
        self._numbered: Counter[int] = Counter()  # rows by width that were given consecutive numbers
        self._gate = Gate()  # readers inside, and whoever divides the memory anew
        self._lock = threading.Lock()  # one writer

    def tables(self, manifest: ReleaseManifest) -> CachedTables:
        """What `probe` and `insert` want to know of a release, which is in use from now on until it is forgotten."""
        while (known := self._live.get(manifest.name)) is None:  # again, if it is forgotten meanwhile
            self.expect([manifest])
        return known

    def expect(self, manifests: Iterable[ReleaseManifest]) -> None:
        """Several releases at once: the memory is divided once, not anew with each of them."""
        with self._lock:
            live = dict(self._live)
            for manifest in manifests:
                if manifest.name not in live:
                    live[manifest.name] = self._register(manifest)
            self._settle(live)

    def forget(self, release: str) -> None:
        """The release is no longer in use: its entries count as empty. Whoever still asks for it gets misses or its
        rows, and never another's."""
        with self._lock:
            live = dict(self._live)
            tables = live.pop(release, None)
            if tables is not None:
                self._owners.remove(tables)
                self._settle(live)

    def probe(
        self,
        tables: CachedTables,
        batch: IdBatch,
        out: NDArray[np.uint8],
        starts: NDArray[np.int64],
        status: NDArray[np.uint8],
        *,
        record: bool = True,
    ) -> NDArray[np.int64]:
        """Looks up ids of several tables, which may repeat. Positions of the misses in batch.ids, int64 [k] ascending.

        The row of the i-th id of the batch's k-th table goes to out[starts[k] + i * row_bytes …], its status, FOUND or
        ABSENT (then the row is the table's default), to status uint8 [n]. The status of a miss is left as it is, and
        its row is to be written by whoever finds it. Without `record`, nothing is counted and nothing becomes hotter.
        While the memory is divided anew all are misses.
        """
        if not self._gate.enter():
            return np.arange(len(batch.ids))
        try:
            misses = np.empty(len(batch.ids), np.int64)
            missed = probe(
                self._layout.memory, self._layout.classes, self._owners.lines, self._policy,
                tables.columns, batch.tables, batch.counts, batch.ids,
                out, starts, status, misses, record,
            )  # fmt: skip
        finally:
            self._gate.leave()
        return misses[:missed]

    def insert(
        self,
        tables: CachedTables,
        batch: IdBatch,
        rows: NDArray[np.uint8],
        status: NDArray[np.uint8],
        *,
        warming: bool = False,
    ) -> None:
        """Keeps what a backend answered, as far as the policy admits it.

        rows: uint8 [Σ counts x row_bytes], in the order of the ids, read where status uint8 [n] is FOUND; ABSENT is
        kept too, and nothing else. `warming`: rows that nobody asked for yet, hottest first. They take empty ways, and
        up to half of a set from other releases: of the same model what is used least, of others what is not used.
        """
        if self._gate.closed:
            return
        with self._lock:
            insert(
                self._layout.memory, self._layout.classes, self._owners.lines, self._policy,
                tables.columns, tables.defaults, batch.tables, batch.counts, batch.ids, rows, status, warming,
            )  # fmt: skip

    def stats(self) -> CacheStats:
        with self._lock:
            releases = {name: self._owners.stats(tables) for name, tables in self._live.items()}
            return CacheStats(self.budget, self._layout.bytes, self._layout.entries, releases)

    def _settle(self, live: dict[str, CachedTables]) -> None:
        """Divides the memory for the releases in use, where it is not divided well enough."""
        sets = plan((tables.manifest for tables in live.values()), self.budget)
        if not self._layout.fits(sets):
            with self._gate.closing():
                self._layout.divide_anew(sets, self._owners.lines)
        self._live = live

    def _register(self, manifest: ReleaseManifest) -> CachedTables:
        salts = []
        for table in manifest.tables:
            salts.append(self._numbered[table.row_bytes])
            self._numbered[table.row_bytes] += table.rows
        classes = [self._layout.class_of(table.row_bytes) for table in manifest.tables]
        return self._owners.add(manifest, classes, salts)
