"""Circuit breaker: who has failed several times in a row is left alone for a while, and callers learn so at once."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable

FAILURES = 5  # in a row, that open it
PROBE_SECONDS = 1.0  # a caller that tries whether service is back waits no longer
_FIRST_PAUSE = 0.1  # seconds
_LONGEST_PAUSE = 2.0  # with a probe's second, service resumes well within five seconds of the cause's end


class Breaker:
    """Thread-safe. Closed: everybody may ask. Open: nobody may, until a pause is over; then one may, and only where
    that fails is there another pause, twice as long. Each is shortened by chance, up to a half, so that the processes
    which lost a server at one moment do not come back to it at one moment."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._probes = 0
        self._trying = False  # somebody does, who has not reported yet
        self._closed_until = 0.0  # before that nobody may ask; of an open breaker
        self._reason = ""
        self._lock = threading.Lock()

    @property
    def open(self) -> bool:
        return self._failures >= FAILURES

    @property
    def lets(self) -> bool:
        """Whether `allowance` would be more than 0."""
        return not self.open or self._clock() >= self._closed_until

    @property
    def reason(self) -> str:
        """Of the last failure."""
        return self._reason

    def allowance(self) -> float:
        """Seconds that a caller may take: no limit, PROBE_SECONDS, or 0: it must not ask."""
        with self._lock:
            if not self.open:
                return math.inf
            now = self._clock()
            if now < self._closed_until:
                return 0.0
            self._probes += 1
            self._trying = True
            self._closed_until = now + PROBE_SECONDS  # should this caller never come back
            return PROBE_SECONDS

    def succeeded(self) -> None:
        with self._lock:
            self._failures = self._probes = 0
            self._trying = False

    def undecided(self) -> None:
        """A caller found out neither. Where it was the one who tried, another may."""
        with self._lock:
            if self._trying:
                self._trying, self._closed_until = False, self._clock()

    def failed(self, reason: str) -> None:
        with self._lock:
            self._failures += 1
            self._trying = False
            self._reason = reason
            if self.open:
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._probes, 10))
                self._closed_until = self._clock() + pause * random.uniform(0.5, 1)
