"""Which entries stay: every decision against a model of lists, and hit rates on simulated traffic against LRU's."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from embedding_store.cache_set import GHOST_COUNT, WAYS, fingerprint, set_bytes
from embedding_store.hot_cache import HotCache
from scripts.bench.cache_traffic import exact_lru, hit_rate, moving, ranks, static_top
from tests.embedding_store.cached_rows import Asked, manifest_of, table_of

ABSENT_WAYS = 2
OWNER = 1  # of the first table that a cache gets to know


class LruSet:
    """Ids in the order of their last use, oldest first, with whether the table has them."""

    def __init__(self, number: int) -> None:
        self.ids: dict[int, bool] = {}

    def ask(self, key: int, found: bool) -> bool:
        if key in self.ids:
            self.ids[key] = self.ids.pop(key)
            return True
        absent = [old for old, known in self.ids.items() if not known]
        if not found and len(absent) == ABSENT_WAYS:
            del self.ids[absent[0]]
        elif len(self.ids) == WAYS:
            del self.ids[next(iter(self.ids))]
        self.ids[key] = found
        return False


class S3FifoSet:
    """One queue of [id, found, uses, on probation], oldest first, and marks of what left lately."""

    lead = 0  # of S3-FIFO over CLOCK, in misses

    def __init__(self, number: int) -> None:
        self.side = number % 64
        self.queue: list[list[int]] = []
        self.ghosts: deque[int] = deque(maxlen=GHOST_COUNT)

    def ask(self, key: int, found: bool) -> bool:
        for entry in self.queue:
            if entry[0] == key:
                entry[2] = min(3, entry[2] + 1)
                return True
        absent = [entry for entry in self.queue if not entry[1]]
        crowded = not found and len(absent) == ABSENT_WAYS
        probation = False
        if crowded or len(self.queue) == WAYS:
            clock = self.duel()
            mark = fingerprint(key, OWNER)  # the real ones: of 15 bits, so that some collide
            known = mark in self.ghosts
            if known:
                self.ghosts[self.ghosts.index(mark)] = 0
            goes = absent[0] if crowded else self.victim(known, clock)
            self.queue.remove(goes)
            if goes[3] or clock:
                self.ghosts.appendleft(fingerprint(goes[0], OWNER))
            probation = not known and not clock
        self.queue.append([key, found, 0, probation])
        return False

    def duel(self) -> bool:
        if self.side < 2:
            step = 1 if self.side == 0 else -1
            S3FifoSet.lead = max(-512, min(512, S3FifoSet.lead + step))
        return self.side == 0 or (self.side > 1 and S3FifoSet.lead < 0)

    def victim(self, known: bool, clock: bool) -> list[int]:
        while True:
            new = [entry for entry in self.queue if entry[3]]
            old = [entry for entry in self.queue if not entry[3]]
            entry = (self.queue if clock else new if len(new) > known else old)[0]
            if entry[2] == 0:
                return entry
            entry[2] = 0 if clock or entry[3] else entry[2] - 1
            entry[3] = 0
            self.queue.remove(entry)
            self.queue.append(entry)


@pytest.mark.parametrize("sets", [1, 3, 20, 150])
@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_every_hit_and_eviction_is_the_models(policy: str, sets: int) -> None:
    rng = np.random.default_rng(sets)
    rows = 60 * sets
    asked = Asked(HotCache(sets * set_bytes(16) + 64, policy), manifest_of(table_of("t", rows, 16)))
    assert asked.cache.stats().capacity == sets * WAYS
    S3FifoSet.lead = 0
    kind = LruSet if policy == "lru" else S3FifoSet
    models = [kind(number) for number in range(sets)]
    ids = rng.permutation(rows * 5 // 4)[rng.zipf(1.15, 2000 + 20 * sets) % (rows * 5 // 4)]
    hits = 0
    for key in ids.tolist():
        expected = models[_set_of(key, sets)].ask(key, key < rows)
        assert asked.ask(np.array([key]))[0] == expected
        hits += expected
    stats = asked.cache.stats().releases["m@1"]["t"]
    held = sum(len(model.ids if isinstance(model, LruSet) else model.queue) for model in models)
    assert (stats.hits, stats.misses, stats.entries) == (hits, len(ids) - hits, held)
    assert stats.evictions == stats.misses - held


def _set_of(key: int, sets: int) -> int:
    """Of a dense id, in Python's integers."""
    return ((key * 0x9E3779B97F4A7C15 % 2**64) >> 32) * sets >> 32


def test_zipf_08_with_a_cache_of_a_hundredth() -> None:
    """1 M ids, 10,000 entries, 3 M requests in batches of 2,000. Ideal is a cache of the 10,000 most frequent ids."""
    rng = np.random.default_rng(8)
    ids = rng.permutation(1_000_000)[ranks(rng, 1_000_000, 0.8, 3_000_000)]
    rates = {policy: hit_rate(policy, ids, 10_000, batch=2000) for policy in ("lru", "s3fifo")}
    ideal = static_top(1_000_000, 0.8, 10_000)
    print(rates, "ideal", ideal)
    assert 0.29 <= rates["s3fifo"] <= ideal
    assert rates["lru"] < 0.24


@pytest.mark.parametrize("hottest", [100, 1000, 100_000])
def test_a_hot_set_that_moves(hottest: int) -> None:
    """100,000 ids, 1,000 entries; every 40,000 requests the hottest 100, 1,000 or all ranks move."""
    ids = moving(np.random.default_rng(hottest), 100_000, 1_200_000, hottest=hottest)
    rates = {policy: hit_rate(policy, ids, 1000, batch=100) for policy in ("lru", "s3fifo")}
    exact = exact_lru(ids, 1000)
    print(rates, "exact LRU", exact)
    assert rates["s3fifo"] >= max(rates["lru"], exact)


def test_a_hot_set_that_moves_before_the_cache_has_learnt_it() -> None:
    """1 M ids, 10,000 entries: 4 requests per entry, and everything is new. LRU is best then; sets duel, and follow."""
    ids = moving(np.random.default_rng(9), 1_000_000, 1_600_000, hottest=1_000_000)
    rates = {policy: hit_rate(policy, ids, 10_000, batch=400) for policy in ("lru", "s3fifo")}
    print(rates)
    assert rates["s3fifo"] >= rates["lru"] - 0.002
