"""What a sidecar counts.

All of it is written by the event loop alone, so that nothing here needs a lock.
"""

from __future__ import annotations

import bisect
import math
import time
from collections import Counter
from dataclasses import dataclass, field

from embedding_store.sidecar_ready import DegradedShare

_STEPS = 8  # buckets per doubling: a percentile is at most 9 % above the true one
_BUCKETS = 27 * _STEPS  # 1 µs to 134 s
_EDGES = [2 ** (bucket / _STEPS) for bucket in range(_BUCKETS)]


class LatencyHistogram:
    """Fixed logarithmic buckets: bucket i counts what took at most 2^(i / 8) µs, and more than the one before it."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.total = 0
        self.seconds = 0.0

    def record(self, seconds: float) -> None:
        self._counts[min(bisect.bisect_left(_EDGES, seconds * 1e6), _BUCKETS - 1)] += 1
        self.total += 1
        self.seconds += seconds

    def percentile(self, share: float) -> float:
        """Upper edge, in µs, of the bucket in which the `share` (0 … 1) of the calls is reached; 0 before the first."""
        if not self.total:
            return 0.0
        wanted = max(1, math.ceil(share * self.total))
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return _EDGES[bucket]
        raise AssertionError("counts do not add up to their total")

    def doublings(self) -> list[tuple[float, int]]:
        """(upper edge in seconds, calls that took at most this), an edge per doubling."""
        found, seen = [], 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if bucket % _STEPS == 0:
                found.append((_EDGES[bucket] * 1e-6, seen))
        return found


@dataclass(slots=True)
class SidecarStats:
    started: float = field(default_factory=time.time)
    connections: int = 0  # open now
    connections_limit: int = 0
    connections_total: int = 0
    connections_rejected: int = 0  # there were too many
    connections_idle_closed: int = 0
    commands: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # error replies by code, to look-ups or anything else
    lookups: int = 0  # answered
    ids: int = 0  # as asked, duplicates within one request included
    absent: int = 0
    unavailable: int = 0
    stale: int = 0
    offloaded: int = 0  # look-ups that went to a thread because a row had to come over a network
    waiting: int = 0  # of them, not answered yet
    late: int = 0  # look-ups that took longer than the request allowed, answered or not
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    degraded: DegradedShare = field(default_factory=DegradedShare)
