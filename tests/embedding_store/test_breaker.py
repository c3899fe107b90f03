"""The circuit breaker by a clock of the test's own, and before real servers."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedding_store.backend import FETCH_BUCKETS
from embedding_store.batch import FetchedRows, batch_of
from embedding_store.breaker import FAILURES, PROBE_SECONDS, Breaker
from embedding_store.lookup import FOUND, UNAVAILABLE
from embedding_store.open import open_backend
from embedding_store.publish import publish
from tests.embedding_store.bundles import Bundle, make_bundle
from tests.redis_server import RedisServer
from tests.tcp_proxy import TcpProxy

SECONDS = 5.0  # within which service must resume


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        assert breaker.allowance() == math.inf
        breaker.failed("cannot be reached")
    assert breaker.open
    return breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(Clock())
    for _ in range(10):
        for _ in range(FAILURES - 1):
            breaker.failed("late")
        assert breaker.allowance() == math.inf
        breaker.succeeded()
    assert not breaker.open
    assert opened(Clock()).reason == "cannot be reached"


def test_one_caller_tries_after_a_pause_that_grows_up_to_two_seconds() -> None:
    clock = Clock()
    breaker = opened(clock)
    pauses = []
    for _ in range(12):
        began = clock.now
        while not breaker.lets:
            assert breaker.allowance() == 0
            clock.now += 0.001
        pauses.append(clock.now - began)
        assert breaker.allowance() == PROBE_SECONDS
        assert breaker.allowance() == 0  # the others wait for what comes of it
        breaker.failed("late")
    assert 0.05 <= pauses[0] <= 0.102
    assert 1 <= max(pauses) <= 2.002
    assert pauses[-1] + PROBE_SECONDS < SECONDS
    clock.now += 2
    assert breaker.allowance() == PROBE_SECONDS
    breaker.succeeded()
    assert not breaker.open
    assert breaker.allowance() == math.inf


def test_a_caller_that_never_reports_does_not_keep_it_open() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 0.2
    assert breaker.allowance() == PROBE_SECONDS
    clock.now += PROBE_SECONDS
    assert breaker.allowance() == PROBE_SECONDS


def test_where_one_who_tried_found_out_nothing_another_tries() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 0.2
    for _ in range(3):
        assert breaker.allowance() == PROBE_SECONDS
        assert breaker.allowance() == 0
        breaker.undecided()
    assert breaker.open
    breaker.failed("late")
    breaker.undecided()  # of an older call: the pause after a failure stays
    assert breaker.allowance() == 0


def test_of_many_callers_at_one_moment_one_tries() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 0.2
    with ThreadPoolExecutor(16) as threads:
        allowances = list(threads.map(lambda _: breaker.allowance(), range(200)))
    assert sorted(set(allowances)) == [0, PROBE_SECONDS]
    assert allowances.count(PROBE_SECONDS) == 1


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=2)


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_is_away_is_not_asked_until_it_is_back(
    redis_server: RedisServer, bundle: Bundle, silent: bool
) -> None:
    """Stopped: connections are refused. Silent: they are accepted, and nothing is answered."""

    def ask() -> FetchedRows:
        return backend.fetch(bundle.name, batch_of(bundle.manifest, {"item": np.arange(100)}), timeout=0.1)

    with open_backend(redis_server.tcp_url) as backend:
        publish(bundle.folder, backend)
        assert ask().error is None
        if silent:
            redis_server.pause()
        else:
            redis_server.stop()
        why = f"{backend.address} {'did not answer within' if silent else 'cannot be reached: Connection refused'}"
        for _ in range(FAILURES):
            fetched = ask()
            assert str(fetched.error).startswith(why)
        assert backend.nodes()[0].open
        began = time.monotonic()
        fast = [ask() for _ in range(50)]
        assert time.monotonic() - began < 50 * 0.1  # not one waited for its deadline, a probe or two aside
        assert all((fetched.status == UNAVAILABLE).all() for fetched in fast)
        assert sum(f"not asked now, after {FAILURES} failures in a row" in str(one.error) for one in fast) >= 45
        if silent:
            redis_server.resume()
        else:
            redis_server.start()
            publish(bundle.folder, backend)
        back = time.monotonic()
        while (fetched := ask()).error is not None:
            assert time.monotonic() - back < SECONDS
            time.sleep(0.01)
        assert (fetched.status == FOUND).all()
        assert not backend.nodes()[0].open


def test_what_was_asked_of_a_server_is_counted(redis_server: RedisServer, bundle: Bundle) -> None:
    with open_backend(redis_server.tcp_url) as backend:
        publish(bundle.folder, backend)
        ids = batch_of(bundle.manifest, {"item": np.arange(100)})
        for _ in range(7):
            backend.fetch(bundle.name, ids)
        redis_server.stop()
        for _ in range(3):
            backend.fetch(bundle.name, ids)
        (node,) = backend.nodes()
        assert (node.address, node.open, node.fetches, node.failures) == (backend.address, False, 10, 3)
        assert len(node.buckets) == len(FETCH_BUCKETS) + 1
        assert sum(node.buckets) == 10
        assert 0 < node.seconds < 10


def test_callers_without_patience_do_not_shut_out_those_who_have_some(
    redis_server: RedisServer, bundle: Bundle
) -> None:
    """The server is well; only no answer can be there within a few microseconds."""
    ids = batch_of(bundle.manifest, {"item": np.arange(100)})
    with open_backend(redis_server.tcp_url) as backend:
        publish(bundle.folder, backend)
        assert backend.fetch(bundle.name, ids).error is None
        for _ in range(20):
            hurried = [backend.fetch(bundle.name, ids, timeout=0.00005) for _ in range(FAILURES)]
            assert any(fetched.error for fetched in hurried)
            assert backend.fetch(bundle.name, ids, timeout=5).error is None


def test_an_open_breaker_closes_where_an_answer_is_only_slow(redis_server: RedisServer, bundle: Bundle) -> None:
    ids = batch_of(bundle.manifest, {"item": np.arange(5000)})
    with TcpProxy(redis_server.port) as proxy, open_backend(f"redis://127.0.0.1:{proxy.port}") as backend:
        publish(bundle.folder, backend)
        assert backend.fetch(bundle.name, ids).error is None
        redis_server.pause()
        for _ in range(FAILURES):
            backend.fetch(bundle.name, ids, timeout=0.05)
        assert backend.nodes()[0].open
        redis_server.resume()
        proxy.bytes_per_second = 20_000
        began = time.monotonic()
        while backend.nodes()[0].open:
            assert backend.fetch(bundle.name, ids, timeout=0.5).error is not None
            assert time.monotonic() - began < SECONDS
            time.sleep(0.02)
