"""Misses of concurrent look-ups, joined: an id is fetched once however many wait for it, and what comes while fetches
are under way rides in the next one, all of it together. No timer: the first comer never waits for company.

A `Flight` gathers ids until it departs. The look-up that leads it runs the fetch, in its own thread and under its own
deadline. Where a leader gives up before the departure, another look-up that waits takes its place; where its deadline
cut the fetch short, or the fetch raised in its thread, those with time left ask again: nobody fails because of somebody
else's deadline, or is told of somebody else's error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import FetchedRows, IdBatch, copy_rows, row_offsets, row_starts
from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import UNAVAILABLE
from embedding_store.seats import Seats

# (batch, seconds or None) -> rows, as `Backend.fetch`; who gives it puts the rows into the cache as well.
Fetch = Callable[[IdBatch, float | None], FetchedRows]

_AT_ONCE = 2  # fetches of one release under way: one travels while the other is decoded
_ROUNDING = 0.001  # seconds by which a time-out may fire early


class Flight:
    """Distinct ids of one release on their way. Everything here is read and written under the queue's lock."""

    def __init__(self, lock: threading.Lock) -> None:
        self.seats = Seats()
        self.changed = threading.Condition(lock)
        self.aboard = 0  # look-ups that wait for the departure
        self.leader: int | None = None  # a thread
        self.landed: FetchedRows | None = None
        self.cut_short = False  # by the leader's deadline, or an exception in its thread
        self.offsets = np.empty(0, np.int64)  # where the landed rows begin
        self.places = np.empty(0, np.int64)  # of each seat, in the landed status


@dataclass(frozen=True, slots=True)
class _Ticket:
    """What one look-up has on one flight: positions among the look-up's ids, and their seats."""

    flight: Flight
    positions: NDArray[np.int64]
    seats: NDArray[np.int64]


@dataclass(slots=True)
class MissStats:
    fetches: int = 0
    fetched: int = 0  # ids
    joined: int = 0  # ids that a fetch of another look-up brought
    deadline_misses: int = 0  # look-ups that stopped waiting
    shed: int = 0  # look-ups that were turned away


class MissQueue:
    """The misses of one release. Thread-safe.

    widths: int64, row bytes by the table's place in the manifest. most_waiting: ids that may wait for a departure; a
    look-up that would exceed it is turned away at once, which is better than late.
    """

    def __init__(self, fetch: Fetch, widths: NDArray[np.int64], most_waiting: int = 1 << 18) -> None:
        self._fetch = fetch
        self._widths = widths
        self._most_waiting = most_waiting
        self._lock = threading.Lock()
        self._flying: list[Flight] = []
        self._gathering: Flight | None = None
        self.stats = MissStats()

    @property
    def waiting(self) -> int:
        """Ids that wait for a departure at this moment."""
        gathering = self._gathering
        return 0 if gathering is None else len(gathering.seats)

    def fetch(self, batch: IdBatch, timeout: float | None) -> FetchedRows:
        """As `Backend.fetch`, but for any ids: they may repeat, and other threads may ask for them too."""
        deadline = None if timeout is None else time.monotonic() + timeout
        starts = row_starts(batch, self._widths)
        offsets = row_offsets(batch.tables, batch.counts, self._widths, starts)
        answer = FetchedRows(np.empty(starts[-1], np.uint8), np.full(len(batch.ids), UNAVAILABLE, np.uint8))
        left = np.arange(len(batch.ids), dtype=np.int64)
        error: StoreUnavailable | None = None
        late = False
        while len(left):
            again = [np.empty(0, np.int64)]
            try:
                tickets = self._board(batch, left)
            except StoreUnavailable as shed:
                error = shed
                break
            # The one that gathers first, as this look-up may lead it: it is not to wait for the others' landing.
            for ticket in reversed(tickets):
                landed = self._await(ticket.flight, deadline)
                if landed is None:
                    late = True
                    continue
                self._collect(ticket, landed, batch, answer, offsets)
                if ticket.flight.cut_short and _left(deadline) != 0:
                    again.append(ticket.positions[answer.status[ticket.positions] == UNAVAILABLE])
                else:
                    late = late or ticket.flight.cut_short
                    error = error or landed.error
            left = np.sort(np.concatenate(again))
        return self._told(answer, error, late, timeout)

    def _told(
        self, answer: FetchedRows, error: StoreUnavailable | None, late: bool, timeout: float | None
    ) -> FetchedRows:
        """The answer with the reason for what it lacks. late: whether the look-up's own time was over."""
        lost = int(np.count_nonzero(answer.status == UNAVAILABLE))
        if late:
            with self._lock:
                self.stats.deadline_misses += 1
        if lost and error is None:
            error = StoreUnavailable(f"{lost} ids were not fetched within {timeout:.2g} s")
        return FetchedRows(answer.rows, answer.status, error if lost else None)

    # ---- boarding

    def _board(self, batch: IdBatch, left: NDArray[np.int64]) -> list[_Ticket]:
        """A seat for each of these positions, on flights under way where they are among them, else on the next one."""
        tickets = []
        with self._lock:
            for flight in self._flying:
                seats = flight.seats.find(batch.select(left))
                if (seats >= 0).any():
                    tickets.append(_Ticket(flight, left[seats >= 0], seats[seats >= 0]))
                    self.stats.joined += len(tickets[-1].seats)
                    left = left[seats < 0]
            if len(left):
                tickets.append(self._board_next(batch, left))
        return tickets

    def _board_next(self, batch: IdBatch, left: NDArray[np.int64]) -> _Ticket:
        gathering = self._gathering
        if gathering is None:
            gathering = self._gathering = Flight(self._lock)
        elif len(gathering.seats) + len(left) > self._most_waiting:
            self.stats.shed += 1
            raise StoreUnavailable(
                f"{len(gathering.seats)} ids wait for the store already, at most {self._most_waiting} may: turned away"
            )
        gathering.aboard += 1
        before = len(gathering.seats)
        seats = gathering.seats.take(batch.select(left))
        self.stats.joined += len(left) - (len(gathering.seats) - before)
        return _Ticket(gathering, left, seats)

    # ---- flying

    def _await(self, flight: Flight, deadline: float | None) -> FetchedRows | None:
        """What it brought; None where it did not land in time. The caller leads it where nobody else does."""
        with self._lock:
            in_time = False
            try:
                in_time = self._wait(flight, deadline)
            finally:  # also where the handler of a signal raises, as that of Ctrl-C does
                if not in_time:
                    self._give_up(flight)
        if in_time and flight.landed is None:
            self._fly(flight, deadline)
        return flight.landed if in_time else None

    def _wait(self, flight: Flight, deadline: float | None) -> bool:
        """Until it has landed, or the caller is to fly it; False where the time was over before. Under the lock."""
        me = threading.get_ident()
        while flight.landed is None:
            if flight is self._gathering and flight.leader is None:
                flight.leader = me
            if flight.leader == me and len(self._flying) < _AT_ONCE:
                self._gathering = None
                self._flying.append(flight)
                return True
            if not flight.changed.wait(_left(deadline)) and _left(deadline) == 0:
                return False
        return True

    def _give_up(self, flight: Flight) -> None:
        """Somebody else who waits leads from here; a flight that nobody waits for makes room. Under the lock."""
        if flight is not self._gathering:
            return
        flight.aboard -= 1
        if not flight.aboard:
            self._gathering = None
        elif flight.leader == threading.get_ident():
            flight.leader = None
            flight.changed.notify_all()  # and not only one, who may be giving up at this moment too

    def _fly(self, flight: Flight, deadline: float | None) -> None:
        batch, flight.places = flight.seats.batch()
        landed = None
        try:
            landed = self._fetch(batch, _left(deadline))
        finally:
            self._land(flight, batch, landed, deadline)

    def _land(self, flight: Flight, batch: IdBatch, landed: FetchedRows | None, deadline: float | None) -> None:
        """landed: None where the fetch raised."""
        nothing = np.full(len(batch.ids), UNAVAILABLE, np.uint8)
        starts = row_starts(batch, self._widths)
        with self._lock:
            flight.offsets = row_offsets(batch.tables, batch.counts, self._widths, starts)
            flight.cut_short = landed is None or (
                landed.error is not None and deadline is not None and time.monotonic() > deadline - _ROUNDING
            )
            flight.landed = landed or FetchedRows(np.empty(0, np.uint8), nothing, StoreUnavailable("the fetch failed"))
            self._flying.remove(flight)
            self.stats.fetches += 1
            self.stats.fetched += len(batch.ids)
            flight.changed.notify_all()
            if self._gathering is not None:
                self._gathering.changed.notify_all()  # its leader may depart

    def _collect(
        self, ticket: _Ticket, landed: FetchedRows, batch: IdBatch, answer: FetchedRows, offsets: NDArray[np.int64]
    ) -> None:
        flight, mine = ticket.flight, batch.select(ticket.positions)
        copy_rows(
            landed.rows, landed.status, flight.offsets, flight.places[ticket.seats],
            mine.tables, mine.counts, self._widths,
            ticket.positions, answer.rows, answer.status, offsets,
        )  # fmt: skip


def _left(deadline: float | None) -> float | None:
    """Seconds, not below 0."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
