"""Whether a sidecar should get traffic, and if not, why."""

from __future__ import annotations

import time
from collections.abc import Callable

WINDOW_SECONDS = 10


class DegradedShare:
    """Share of degraded rows (UNAVAILABLE, STALE, or refused with the whole look-up) among those that were asked for
    in the last WINDOW_SECONDS, in steps of a second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows = [0] * WINDOW_SECONDS
        self._degraded = [0] * WINDOW_SECONDS
        self._second = int(clock())

    def record(self, rows: int, degraded: int) -> None:
        self._forget()
        slot = self._second % WINDOW_SECONDS
        self._rows[slot] += rows
        self._degraded[slot] += degraded

    @property
    def share(self) -> float:
        """0 … 1; 0 where nothing was asked for."""
        self._forget()
        return sum(self._degraded) / max(1, sum(self._rows))

    def _forget(self) -> None:
        now = int(self._clock())
        for second in range(max(self._second + 1, now - WINDOW_SECONDS + 1), now + 1):
            self._rows[second % WINDOW_SECONDS] = self._degraded[second % WINDOW_SECONDS] = 0
        self._second = max(self._second, now)


class Readiness:
    """limit: degraded share, 0 … 1, above which a balancer had better ask another sidecar."""

    def __init__(self, degraded: DegradedShare, limit: float) -> None:
        self._degraded = degraded
        self._limit = limit
        self._phase = "warming"

    def serving(self) -> None:
        self._phase = ""

    def draining(self) -> None:
        self._phase = "draining"

    @property
    def obstacle(self) -> str:
        """Why it is not ready; empty where it is."""
        share = self._degraded.share
        if not self._phase and share > self._limit:
            return f"degraded: {share:.1%} of the rows of the last {WINDOW_SECONDS} s, more than {self._limit:.1%}"
        return self._phase
