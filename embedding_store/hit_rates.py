"""What share of the ids a cache of so many entries answers, out of how unevenly they were asked for.

Requests are taken as independent draws (every id at its own steady rate). Hit rates of least-recently-used caches then
follow from one number, the time T an entry stays when nobody asks for it (Che, Tung & Wang, Hierarchical Web caching
systems, JSAC 2002): an id of rate r is there with probability 1 − exp(−rT), and T is where these add up to the entries.

A data set does not tell the rates of rare ids: of two ids that it names once, one was lucky. Counts up to 20 are
therefore replaced by what ids of such a count will bring on average, (c + 1) N[c+1] / N[c] with N[c] ids of count c
(Good, The population frequencies of species, Biometrika 1953), and ids that will come but did not yet are estimated
from those that came once and twice (Chao, Nonparametric estimation of the number of classes in a population,
Scand. J. Statist. 1984), at most the rows that are left. Chao's estimate is a lower bound: where a cache has room for
about all ids that the data set names, the prediction is an upper one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray

from embedding_store.access_counts import AccessCounts

_RARE = 20  # counts that are smoothed: the histogram has exact ones below 32
_ENOUGH = 100  # ids of a count, for N[c] to be known to a tenth
_LOG_TIMES = (-50.0, 60.0)  # T in requests, from e^-50 to e^60


@dataclass(frozen=True)
class Popularity:
    """Groups of ids that are asked for about as often: three columns, float64 [groups] each."""

    ids: NDArray[np.float64]
    rate: NDArray[np.float64]  # requests that ask for one such id, of as many requests as were counted
    repeats: NDArray[np.float64]  # how often such a request names it, 1 or more

    @property
    def live(self) -> float:
        """Ids that will be asked for."""
        return float(self.ids.sum())

    @property
    def asked(self) -> float:
        """Distinct ids of each request, over all counted requests."""
        return float((self.ids * self.rate).sum())


def popularity(counts: AccessCounts, rows: int) -> Popularity:
    """Of a table of `rows` rows."""
    ids, asked, reads = counts.columns()
    rate = asked / ids
    having = dict(zip(rate.tolist(), ids.tolist(), strict=True))  # exact counts: see AccessCounts
    once, twice = having.get(1.0, 0.0), having.get(2.0, 0.0)
    for group, count in enumerate(rate.tolist()):
        if count > _RARE or having.get(count + 1, 0) < _ENOUGH:
            break
        rate[group] = (count + 1) * having[count + 1] / ids[group]
    unseen = min(rows - counts.ids, once * (once - 1) / (2 * (twice + 1)))
    if unseen > 0:
        ids, rate = np.append(ids, unseen), np.append(rate, once / unseen)
        asked, reads = np.append(asked, 1), np.append(reads, 1)
    return Popularity(ids, rate, reads / asked)


def together(tables: Sequence[Popularity]) -> Popularity:
    """Of tables that share the entries of a cache."""
    columns = [(table.ids, table.rate, table.repeats) for table in tables]
    return Popularity(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def lru(popular: Popularity, entries: float) -> NDArray[np.float64]:
    """float64 [groups]: the share of a group's ids that a least-recently-used cache has at a moment."""
    if entries >= popular.live:
        return np.ones(len(popular.ids))
    low, high = _LOG_TIMES
    for _ in range(60):
        middle = (low + high) / 2
        filled = float((popular.ids * _present(popular, middle)).sum())
        low, high = (low, middle) if filled > entries else (middle, high)
    return _present(popular, low)


def _present(popular: Popularity, log_time: float) -> NDArray[np.float64]:
    present: NDArray[np.float64] = -np.expm1(-popular.rate * exp(log_time))
    return present


def ideal(popular: Popularity, entries: float) -> NDArray[np.float64]:
    """As `lru`, of a cache that holds the ids that are asked for most, and never another one."""
    order = np.argsort(-popular.rate, kind="stable")
    ids = popular.ids[order]
    held = np.clip(entries - (np.cumsum(ids) - ids), 0, ids) / ids
    present = np.empty(len(ids))
    present[order] = held
    return present


def s3fifo(popular: Popularity, entries: float) -> NDArray[np.float64]:
    """As `lru`, of the cache's default policy, which is between `lru` and `ideal`: 0.7 of the way where few of the ids
    find a place, less where most do.

    Fitted to HotCache on Zipf 0.6 to 1.3 with places for 0.3 % to 60 % of the ids; no theory stands behind it.
    """
    below, above = lru(popular, entries), ideal(popular, entries)
    way = float(0.7 * max(0.0, 1 - entries / max(popular.live, 1)) ** 1.5)
    return below + way * (above - below)
