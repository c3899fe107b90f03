"""MissQueue: one fetch per id, joint fetches, and everybody's own deadline."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from embedding_store.batch import FetchedRows, IdBatch, row_offsets, row_starts
from embedding_store.errors import StoreUnavailable, UnknownRelease
from embedding_store.lookup import ABSENT, FOUND, UNAVAILABLE
from embedding_store.misses import MissQueue

WIDTHS = np.array([8, 16, 24], np.int64)
PATIENCE = 20.0  # seconds that nothing here should take


def row_of(place: int, row: int) -> bytes:
    """What the shelf below has for an id: its table and itself, as often as the row is wide."""
    return (np.int64(row * 10 + place).tobytes() * 3)[: WIDTHS[place]]


class Shelf:
    """A backend's `fetch` over made-up rows: ids from 0 up are there. It waits at a gate, as long as `timeout` says."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fetched: list[IdBatch] = []
        self.arrived = threading.Semaphore(0)

    def fetch(self, batch: IdBatch, timeout: float | None) -> FetchedRows:
        self.fetched.append(batch)
        self.arrived.release()
        if not self.gate.wait(timeout):
            nothing = np.full(len(batch.ids), UNAVAILABLE, np.uint8)
            return FetchedRows(np.empty(row_starts(batch, WIDTHS)[-1], np.uint8), nothing, StoreUnavailable("too slow"))
        places = np.repeat(batch.tables, batch.counts).tolist()
        rows = b"".join(row_of(place, row) for place, row in zip(places, batch.ids.tolist(), strict=True))
        status = np.where(batch.ids >= 0, FOUND, ABSENT).astype(np.uint8)
        return FetchedRows(np.frombuffer(bytearray(rows), np.uint8), status)


def one_table(*ids: int, place: int = 0) -> IdBatch:
    return IdBatch(np.array([place]), np.array([len(ids)]), np.array(ids, np.int64))


def check(batch: IdBatch, answer: FetchedRows) -> None:
    offsets = row_offsets(batch.tables, batch.counts, WIDTHS, row_starts(batch, WIDTHS)).tolist()
    places = np.repeat(batch.tables, batch.counts).tolist()
    for place, row, offset, status in zip(places, batch.ids.tolist(), offsets, answer.status.tolist(), strict=True):
        assert status == (FOUND if row >= 0 else ABSENT)
        if row >= 0:
            assert answer.rows[offset : offset + WIDTHS[place]].tobytes() == row_of(place, row)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def queue(shelf: Shelf) -> MissQueue:
    return MissQueue(shelf.fetch, WIDTHS)


def start(
    pool: ThreadPoolExecutor, queue: MissQueue, batch: IdBatch, timeout: float | None = PATIENCE
) -> Future[FetchedRows]:
    return pool.submit(queue.fetch, batch, timeout)


def fill_both_lanes(pool: ThreadPoolExecutor, queue: MissQueue, shelf: Shelf) -> list[Future[FetchedRows]]:
    """Two fetches that stand at the gate, so that what comes now gathers."""
    shelf.gate.clear()
    first = []
    for row in (1001, 1002):
        first.append(start(pool, queue, one_table(row)))
        assert shelf.arrived.acquire(timeout=PATIENCE)
    return first


def test_a_stampede_causes_one_fetch(queue: MissQueue, shelf: Shelf) -> None:
    shelf.gate.clear()
    batch = one_table(7, 3, 5)
    with ThreadPoolExecutor(64) as pool:
        answers = [start(pool, queue, batch) for _ in range(64)]
        wait_until(lambda: queue.stats.joined == 63 * 3)
        shelf.gate.set()
        for answer in answers:
            check(batch, answer.result(PATIENCE))
    assert [fetched.ids.tolist() for fetched in shelf.fetched] == [[7, 3, 5]]


def test_what_comes_meanwhile_rides_together(queue: MissQueue, shelf: Shelf) -> None:
    batches = [one_table(row, row + 1, -1, place=row % 3) for row in range(30)]
    with ThreadPoolExecutor(40) as pool:
        first = fill_both_lanes(pool, queue, shelf)
        answers = [start(pool, queue, batch) for batch in batches]
        distinct = len({(batch.tables[0], row) for batch in batches for row in batch.ids.tolist()})
        wait_until(lambda: queue.waiting + queue.stats.joined == 30 * 3)
        assert queue.waiting == distinct
        shelf.gate.set()
        for batch, answer in zip(batches, answers, strict=True):
            check(batch, answer.result(PATIENCE))
        for answer in first:
            answer.result(PATIENCE)
    assert len(shelf.fetched) == 3
    assert queue.stats.fetches == 3


def test_ids_that_are_under_way_are_not_asked_again(queue: MissQueue, shelf: Shelf) -> None:
    shelf.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = start(pool, queue, one_table(1, 2, 3))
        assert shelf.arrived.acquire(timeout=PATIENCE)
        batch = one_table(9, 3, 2, 9)
        second = start(pool, queue, batch)
        assert shelf.arrived.acquire(timeout=PATIENCE)
        shelf.gate.set()
        check(one_table(1, 2, 3), first.result(PATIENCE))
        check(batch, second.result(PATIENCE))
    assert [fetched.ids.tolist() for fetched in shelf.fetched] == [[1, 2, 3], [9]]


def test_who_gives_up_does_not_fail_the_others(queue: MissQueue, shelf: Shelf) -> None:
    batch = one_table(4, 5)
    with ThreadPoolExecutor(8) as pool:
        first = fill_both_lanes(pool, queue, shelf)
        hasty = start(pool, queue, batch, 0.5)  # leads the flight that gathers
        wait_until(lambda: queue.waiting == 2)
        patient = [start(pool, queue, batch) for _ in range(3)]
        given_up = hasty.result(PATIENCE)
        assert given_up.status.tolist() == [UNAVAILABLE] * 2
        assert "2 ids were not fetched within 0.5 s" in str(given_up.error)
        shelf.gate.set()
        for answer in patient:
            check(batch, answer.result(PATIENCE))
        for answer in first:
            answer.result(PATIENCE)
    assert queue.stats.deadline_misses == 1


def test_a_fetch_that_its_leaders_deadline_cut_short_is_asked_again(queue: MissQueue, shelf: Shelf) -> None:
    shelf.gate.clear()
    batch = one_table(4, 5)
    with ThreadPoolExecutor(8) as pool:
        hasty = start(pool, queue, batch, 0.3)
        assert shelf.arrived.acquire(timeout=PATIENCE)
        patient = [start(pool, queue, batch) for _ in range(3)]
        given_up = hasty.result(PATIENCE)
        assert given_up.status.tolist() == [UNAVAILABLE] * 2
        assert "too slow" in str(given_up.error)
        shelf.gate.set()
        for answer in patient:
            check(batch, answer.result(PATIENCE))


def test_beyond_the_limit_look_ups_are_turned_away(shelf: Shelf) -> None:
    queue = MissQueue(shelf.fetch, WIDTHS, most_waiting=10)
    with ThreadPoolExecutor(8) as pool:
        first = fill_both_lanes(pool, queue, shelf)
        taken = start(pool, queue, one_table(*range(8)))
        wait_until(lambda: queue.waiting == 8)
        refused = queue.fetch(one_table(*range(20, 24)), PATIENCE)
        assert refused.status.tolist() == [UNAVAILABLE] * 4
        assert "8 ids wait for the store already, at most 10 may" in str(refused.error)
        shelf.gate.set()
        check(one_table(*range(8)), taken.result(PATIENCE))
        for answer in first:
            answer.result(PATIENCE)
    assert queue.stats.shed == 1


def test_a_fetch_that_raises_leaves_the_queue_usable(shelf: Shelf) -> None:
    broken = threading.Event()
    broken.set()

    def fetch(batch: IdBatch, timeout: float | None) -> FetchedRows:
        if broken.is_set():
            raise ValueError("broken")
        return shelf.fetch(batch, timeout)

    queue = MissQueue(fetch, WIDTHS)
    with pytest.raises(ValueError, match="broken"):
        queue.fetch(one_table(1), None)
    broken.clear()
    check(one_table(1), queue.fetch(one_table(1), None))


def test_ids_that_all_gave_up_on_take_no_room(shelf: Shelf) -> None:
    """Or nobody could ever board again: the flight would be full, and nobody there to lead it."""
    queue = MissQueue(shelf.fetch, WIDTHS, most_waiting=10)
    with ThreadPoolExecutor(2) as pool:
        first = fill_both_lanes(pool, queue, shelf)
        assert queue.fetch(one_table(*range(8)), 0.05).status.tolist() == [UNAVAILABLE] * 8
        assert queue.waiting == 0
        shelf.gate.set()
        for answer in first:
            answer.result(PATIENCE)
    check(one_table(*range(20, 24)), queue.fetch(one_table(*range(20, 24)), PATIENCE))
    assert queue.stats.shed == 0
    assert shelf.fetched[-1].ids.tolist() == [20, 21, 22, 23]


def test_one_look_up_misses_its_deadline_once(queue: MissQueue, shelf: Shelf) -> None:
    """Though it waited for three flights."""
    with ThreadPoolExecutor(4) as pool:
        first = fill_both_lanes(pool, queue, shelf)
        late = queue.fetch(one_table(1001, 1002, 5), 0.05)
        assert late.status.tolist() == [UNAVAILABLE] * 3
        assert "3 ids were not fetched within 0.05 s" in str(late.error)
        shelf.gate.set()
        for answer in first:
            answer.result(PATIENCE)
    assert queue.stats.deadline_misses == 1


def test_a_leader_that_is_interrupted_hands_over(queue: MissQueue, shelf: Shelf) -> None:
    """Ctrl-C, and whatever else a signal's handler raises in the main thread."""
    batch = one_table(4, 5)
    with ThreadPoolExecutor(4) as pool:
        first = fill_both_lanes(pool, queue, shelf)
        followers = []

        def interrupt() -> None:
            wait_until(lambda: queue.waiting == 2)
            followers.append(start(pool, queue, batch))
            wait_until(lambda: queue.stats.joined == 2)
            os.kill(os.getpid(), signal.SIGINT)

        interrupting = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            queue.fetch(batch, PATIENCE)  # leads the flight that gathers
        interrupting.result(PATIENCE)
        shelf.gate.set()
        check(batch, followers[0].result(PATIENCE))
        for answer in first:
            answer.result(PATIENCE)


def test_who_waits_for_a_fetch_that_raises_asks_again(shelf: Shelf) -> None:
    broken = threading.Semaphore(1)  # fetches that will raise

    def fetch(batch: IdBatch, timeout: float | None) -> FetchedRows:
        answer = shelf.fetch(batch, timeout)
        if broken.acquire(blocking=False):
            raise UnknownRelease("gone")
        return answer

    queue = MissQueue(fetch, WIDTHS)
    shelf.gate.clear()
    batch = one_table(1, 2)
    with ThreadPoolExecutor(4) as pool:
        leader = start(pool, queue, batch, None)
        assert shelf.arrived.acquire(timeout=PATIENCE)
        followers = [start(pool, queue, batch, timeout) for timeout in (None, PATIENCE)]
        wait_until(lambda: queue.stats.joined == 4)
        shelf.gate.set()
        with pytest.raises(UnknownRelease, match="gone"):
            leader.result(PATIENCE)
        for follower in followers:
            check(batch, follower.result(PATIENCE))


def random_batch(rng: np.random.Generator) -> IdBatch:
    tables = rng.permutation(3)[: rng.integers(1, 4)]
    counts = rng.integers(0, 400, len(tables))
    ids = rng.integers(0, 5000, counts.sum())
    edge = rng.random(len(ids)) < 0.05
    ids[edge] = rng.choice([0, -1, -(2**59)], edge.sum())
    return IdBatch(tables.astype(np.int64), counts.astype(np.int64), ids)


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_get_their_own_rows(queue: MissQueue, shelf: Shelf, seed: int) -> None:
    """Rows of several tables, ids that repeat, absent ones; every answer against the rows themselves."""

    def work(number: int) -> None:
        rng = np.random.default_rng([seed, number])
        for _ in range(15):
            batch = random_batch(rng)
            check(batch, queue.fetch(batch, PATIENCE))

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, number) for number in range(8)]:
            future.result(60)
    assert queue.stats.fetched == sum(len(batch.ids) for batch in shelf.fetched)
