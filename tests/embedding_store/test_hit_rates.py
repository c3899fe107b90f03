"""Predicted hit rates beside caches that are simulated, id by id."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.access_counts import AccessCounts, count_groups
from embedding_store.hit_rates import Popularity, ideal, lru, popularity, together

SEED = 20
IDS_PER_REQUEST = 40
ZIPF = [0.6, 0.8, 1.05, 1.3]


def requests(exponent: float, rows: int, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Ids of each request, repeats and all, by Zipf's law; id i is not the i-th most frequent one."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    share = np.arange(1, rows + 1) ** -exponent
    places = np.searchsorted(np.cumsum(share / share.sum()), rng.random((count, IDS_PER_REQUEST)))
    yield from np.random.default_rng(0).permutation(rows)[np.minimum(places, rows - 1)]


def counted(exponent: float, rows: int, count: int, seed: int) -> AccessCounts:
    reads, asked = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for ids in requests(exponent, rows, count, seed):
        np.add.at(reads, ids, 1)
        asked[np.unique(ids)] += 1
    return count_groups(asked, reads, count)


def simulated_lru(exponent: float, rows: int, entries: int, count: int) -> tuple[float, float]:
    """Hit rates per raw and per distinct id, in the second half of `count` requests."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = {"raw": 0, "distinct": 0}
    asked = {"raw": 0, "distinct": 0}
    for number, ids in enumerate(requests(exponent, rows, count, SEED + 1)):
        distinct, repeats = np.unique(ids, return_counts=True)
        present = np.array([id in cache for id in distinct.tolist()])
        if number >= count // 2:
            hits["raw"] += int(repeats[present].sum())
            hits["distinct"] += int(present.sum())
            asked["raw"] += len(ids)
            asked["distinct"] += len(distinct)
        for id in np.random.default_rng(number).permutation(distinct).tolist():
            cache[id] = None
            cache.move_to_end(id)
        while len(cache) > entries:
            cache.popitem(last=False)
    return hits["raw"] / asked["raw"], hits["distinct"] / asked["distinct"]


def rates(popular: Popularity, present: NDArray[np.float64]) -> tuple[float, float]:
    asked = popular.ids * popular.rate
    named = asked * popular.repeats
    return float((named * present).sum() / named.sum()), float((asked * present).sum() / asked.sum())


@pytest.mark.parametrize("exponent", ZIPF)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_lru_of_another_sample_of_the_same_traffic(exponent: float, share: float) -> None:
    """Counts of 20,000 requests predict the hit rates of other requests, repeats within a request and all."""
    rows, entries = 20_000, int(share * 20_000)
    popular = popularity(counted(exponent, rows, 20_000, SEED), rows)
    predicted = rates(popular, lru(popular, entries))
    simulated = simulated_lru(exponent, rows, entries, 8_000)
    print(f"zipf {exponent}, {share:.0%}: predicted {predicted}, simulated {simulated}")
    assert predicted == pytest.approx(simulated, abs=0.015)
    assert predicted[0] > predicted[1]


@pytest.mark.parametrize("exponent", ZIPF)
@pytest.mark.parametrize("count", [1_000, 5_000])
def test_few_counts(exponent: float, count: int) -> None:
    """Of most rows a short sample knows nothing or one request."""
    rows, entries = 100_000, 5_000
    popular = popularity(counted(exponent, rows, count, SEED), rows)
    predicted = rates(popular, lru(popular, entries))
    simulated = simulated_lru(exponent, rows, entries, 5_000)
    print(f"zipf {exponent}, {count} requests: predicted {predicted}, simulated {simulated}")
    assert predicted == pytest.approx(simulated, abs=0.03)


def test_the_entries_are_full_and_no_more() -> None:
    popular = popularity(counted(1.05, 20_000, 2_000, SEED), 20_000)
    for entries in (1, 100, 5_000):
        for policy in (lru, ideal):
            assert float((popular.ids * policy(popular, entries)).sum()) == pytest.approx(entries, rel=1e-6)
    for policy in (lru, ideal):
        assert (policy(popular, 20_000) == 1).all()
        assert policy(popular, 0).max() < 1e-9


def test_ideal_holds_what_is_asked_for_most() -> None:
    popular = Popularity(np.array([100.0, 3.0, 10.0]), np.array([1.0, 50.0, 4.0]), np.ones(3))
    assert ideal(popular, 8).tolist() == [0, 1, 0.5]
    assert ideal(popular, 63).tolist() == [0.5, 1, 1]
    joined = together([popular, Popularity(np.array([2.0]), np.array([9.0]), np.ones(1))])
    assert ideal(joined, 4).tolist() == [0, 1, 0, 0.5]


def test_ids_that_did_not_come_yet() -> None:
    """At most the rows that are left, as often together as those that came once."""
    once = np.ones(1000, np.int64)
    counts = count_groups(np.concatenate([once, 2 * once[:100]]), np.concatenate([once, 2 * once[:100]]), 500)
    assert popularity(counts, 1 << 40).live == pytest.approx(1100 + 1000 * 999 / 202)
    few = popularity(counts, 1500)
    assert few.live == 1500
    assert float((few.ids * few.rate)[-1]) == 1000
    assert popularity(counts, 1100).live == 1100


def test_a_table_that_nobody_reads() -> None:
    popular = popularity(AccessCounts(7, ()), 1000)
    assert (popular.live, popular.asked) == (0, 0)
    assert (lru(popular, 10) == 1).all()
