"""Constant traffic whose every answer is held against what one release must say, and the time line of how it went."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from embedding_store.codec import decode
from embedding_store.errors import StoreError
from embedding_store.lookup import ABSENT, FOUND, STALE, UNAVAILABLE, EmbeddingLookup
from embedding_store.release import TableInfo
from tests.embedding_store.bundles import Bundle

RESUMES_WITHIN = 5.0  # seconds after the cause has ended
PATIENCE = 30.0
_TIMEOUT = 0.5  # of one look-up
_LATE = 3.0  # seconds by which a look-up may overrun it on a busy machine, before it counts as hanging


@dataclass
class Outcome:
    """One look-up: when it ended, and rows by status, or an error."""

    at: float
    statuses: Counter[int] = field(default_factory=Counter)
    error: str = ""

    @property
    def whole(self) -> bool:
        return not self.error and not self.statuses.keys() & {UNAVAILABLE, STALE}


class Traffic:
    """Threads that ask `lookup` for random ids of `bundle` all the time, absent ones among them.

    A row that is FOUND has to be the release's, one that is flagged has to be the default row (or, STALE, that of
    `before`), and ABSENT is an id only where the release has no such id.
    """

    def __init__(self, lookup: EmbeddingLookup, bundle: Bundle, *, before: Bundle | None = None) -> None:
        self._lookup = lookup
        self._bundle = bundle
        self._before = before
        self._known = {name: np.array(list(places), np.int64) for name, places in bundle.raw.items()}
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self.outcomes: list[Outcome] = []

    @contextmanager
    def running(self, threads: int = 2) -> Iterator[Traffic]:
        first = {table.name: np.zeros(1, np.int64) for table in self._bundle.manifest.tables}
        self._lookup.lookup(self._bundle.name, first, timeout=PATIENCE)  # may compile kernels, which takes seconds
        workers = [threading.Thread(target=self._work, args=(seed,)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        try:
            self.wait_for("the first whole answers", lambda: sum(one.whole for one in self.outcomes) >= 3)
            yield self
        finally:
            self._stop.set()
            for worker in workers:
                worker.join(PATIENCE)
        assert not any(worker.is_alive() for worker in workers), "a look-up hangs"
        if self._failures:
            raise self._failures[0]

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert not self._failures, self._failures
            assert time.monotonic() < end, f"no {what} within {seconds:g} s; last: {self.outcomes[-3:]}"
            time.sleep(0.01)

    def wait_until_degraded(self) -> None:
        """Until look-ups that began after this moment fail or have flagged rows."""
        start = time.monotonic() + _TIMEOUT
        self.wait_for("degraded answers", lambda: any(not one.whole and one.at > start for one in self.outcomes))

    def wait_until_whole(self, seconds: float = RESUMES_WITHIN) -> None:
        """Until answers are whole again, a hundred of them in a row."""
        first = len(self.outcomes)

        def resumed() -> bool:
            since = self.outcomes[first:]
            return len(since) >= 100 and all(one.whole for one in since[-100:])

        self.wait_for("resumption", resumed, seconds)

    @property
    def flagged(self) -> Counter[int]:
        """Rows by status over everything that was answered."""
        return sum((one.statuses for one in list(self.outcomes)), Counter())

    @property
    def errors(self) -> Counter[str]:
        return Counter(one.error for one in list(self.outcomes) if one.error)

    def _work(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not self._stop.is_set():
                self._ask(rng)
        except BaseException as error:  # noqa: BLE001  # told to the test, which raises it again
            self._failures.append(error)

    def _ask(self, rng: np.random.Generator) -> None:
        ids = {table.name: self._some(rng, table) for table in self._bundle.manifest.tables}
        began = time.monotonic()
        try:
            reply = self._lookup.lookup(self._bundle.name, ids, timeout=_TIMEOUT)
        except StoreError as error:
            self.outcomes.append(Outcome(time.monotonic(), error=f"{type(error).__name__}: {error}"))
            time.sleep(0.01)
            return
        finally:
            assert time.monotonic() - began < _TIMEOUT + _LATE, "a look-up outlived its deadline"
        assert reply.release == self._bundle.name
        statuses: Counter[int] = Counter()
        for name, wanted in ids.items():
            table = reply.tables[name]
            rows = decode(self._bundle.manifest.table(name).codec, table.rows)[table.index]
            self._check(name, wanted, rows, table.status[table.index])
            statuses.update(table.status[table.index].tolist())
        self.outcomes.append(Outcome(time.monotonic(), statuses))

    def _some(self, rng: np.random.Generator, table: TableInfo) -> NDArray[np.int64]:
        places = rng.integers(-2, table.rows + 5, rng.integers(1, 60))
        if not table.sparse:
            return places
        known = self._known[table.name]
        return np.where(places < len(known), known[np.minimum(places, len(known) - 1)], places)

    def _check(self, table: str, ids: np.ndarray, rows: np.ndarray, status: np.ndarray) -> None:
        expected, there = self._bundle.expected(table, ids)
        found = status == FOUND
        assert there[found].all(), "an id that the release has not was found"
        np.testing.assert_array_equal(rows[found], expected[found])
        assert not there[status == ABSENT].any(), "an id that the release has was called absent"
        default = self._bundle.values[table][-1]
        for flag in (ABSENT, UNAVAILABLE):
            assert (rows[status == flag] == default).all()
        stale = status == STALE
        if stale.any():
            assert self._before is not None
            earlier, was_there = self._before.expected(table, ids)
            assert was_there[stale].all()
            np.testing.assert_array_equal(rows[stale], earlier[stale])
