"""The read path before a real server that breaks off, cuts pages, is slow, loads its data or has other keys' types:
every row is right or flagged, and service resumes."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedding_store.backend import Backend, namespace
from embedding_store.batch import FetchedRows, IdBatch, batch_of
from embedding_store.codec import decode
from embedding_store.lookup import FOUND, UNAVAILABLE
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.redis_keys import Record, page_key
from embedding_store.redis_read import RedisReader
from embedding_store.redis_url import parse_redis_url
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.redis_server import RedisServer
from tests.tcp_proxy import TcpProxy

ROWS, PAGE_ROWS = 20_000, 63
SECONDS = 5.0  # within which service must resume


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("reader") / "bundle"
    bundle = make_bundle(folder, seed=6, tables=(TestTable("item", "fp32", rows=ROWS, dim=32),))
    assert bundle.manifest.tables[0].page_rows == PAGE_ROWS
    return bundle


@pytest.fixture
def backend(redis_server: RedisServer, bundle: Bundle) -> Iterator[Backend]:
    with open_backend(redis_server.url) as backend:
        publish(bundle.folder, backend)
        yield backend


def fetch_all(backend: Backend, bundle: Bundle, *, timeout: float = 10) -> FetchedRows:
    """All rows in a random order; those that are said to be found are checked."""
    ids = np.random.default_rng(0).permutation(ROWS)
    fetched = backend.fetch(bundle.name, batch_of(bundle.manifest, {"item": ids}), timeout=timeout)
    found = fetched.status == FOUND
    assert (found | (fetched.status == UNAVAILABLE)).all()
    assert found.all() == (fetched.error is None)
    values = decode("fp32", fetched.rows.reshape(ROWS, -1))
    np.testing.assert_array_equal(values[found], bundle.values["item"][ids[found]])
    return FetchedRows(fetched.rows, fetched.status[np.argsort(ids)], fetched.error)  # statuses by id


def key(bundle: Bundle, page: int) -> str:
    return page_key("torchrank", namespace(bundle.manifest), "item", page)


def test_more_than_all_buffers_hold_in_one_fetch(backend: Backend, bundle: Bundle) -> None:
    """400,000 rows: 35 MB of commands, 50 MB of replies, on a socket whose buffers have a hundredth of that."""
    tables = np.zeros(20, np.int64)
    ids = np.concatenate([np.random.default_rng(seed).permutation(ROWS) for seed in range(20)])
    fetched = backend.fetch(bundle.name, IdBatch(tables, np.full(20, ROWS), ids), timeout=60)
    assert fetched.error is None
    assert (fetched.status == FOUND).all()
    np.testing.assert_array_equal(decode("fp32", fetched.rows.reshape(len(ids), -1)), bundle.values["item"][ids])


@pytest.mark.parametrize("seed", range(6))
def test_a_connection_reset_in_the_middle_of_a_reply(redis_server: RedisServer, bundle: Bundle, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with TcpProxy(redis_server.port) as proxy, open_backend(f"redis://127.0.0.1:{proxy.port}") as backend:
        publish(bundle.folder, backend)
        if seed % 2:
            assert fetch_all(backend, bundle).error is None  # so that the connection that is cut was used before
        proxy.cut_after = int(rng.integers(1, ROWS * 128))
        fetched = fetch_all(backend, bundle)
        assert proxy.cuts == 1
        # One that was used before and breaks before a byte was read is replaced, and nothing is amiss.
        if fetched.error is not None or seed % 2 == 0:
            assert f"{backend.address} cannot be reached: Connection reset by peer" in str(fetched.error)
        assert fetch_all(backend, bundle).error is None


def test_a_server_that_never_ends_does_not_hold_a_caller_beyond_its_deadline(
    redis_server: RedisServer, bundle: Bundle
) -> None:
    with TcpProxy(redis_server.port) as proxy, open_backend(f"redis://127.0.0.1:{proxy.port}") as backend:
        publish(bundle.folder, backend)
        backend.manifest(bundle.name)  # else its reading is part of the half second
        proxy.bytes_per_second = 10_000  # the rows would take minutes
        began = time.monotonic()
        fetched = fetch_all(backend, bundle, timeout=0.5)
        assert time.monotonic() - began < 2
        assert f"{backend.address} did not answer in full within 0.5 s" in str(fetched.error)
        assert 0 < (fetched.status == FOUND).sum() < ROWS  # what came in time


@pytest.mark.parametrize("timeout", [math.inf, 0xFFFFFFFF / 1000])
def test_a_deadline_that_is_far_off(backend: Backend, bundle: Bundle, timeout: float) -> None:
    """As far as the sidecar's protocol can say, and farther."""
    assert fetch_all(backend, bundle, timeout=timeout).error is None


@pytest.mark.parametrize("whole_rows", [0, 1, 40])
def test_a_page_that_was_cut_short(
    backend: Backend, bundle: Bundle, redis_server: RedisServer, whole_rows: int
) -> None:
    with redis_server.client() as client:
        content = client.get(key(bundle, 7))
        client.set(key(bundle, 7), content[: whole_rows * 128 + 64])
    fetched = fetch_all(backend, bundle)
    expected = np.zeros(ROWS, np.bool_)
    expected[7 * PAGE_ROWS + whole_rows : 8 * PAGE_ROWS] = True
    np.testing.assert_array_equal(fetched.status == UNAVAILABLE, expected)
    assert f"{backend.address} has lost page 7 of table 'item' of demo@1" in str(fetched.error)


def test_a_key_of_another_type(backend: Backend, bundle: Bundle, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.delete(key(bundle, 3))
        client.hset(key(bundle, 3), "a", "b")
        client.delete(key(bundle, 5))
    fetched = fetch_all(backend, bundle)
    np.testing.assert_array_equal(np.unique(np.flatnonzero(fetched.status) // PAGE_ROWS), [3, 5])
    assert f"{backend.address} answered: WRONGTYPE" in str(fetched.error)
    assert "has lost page 5" in str(fetched.error)


def test_restarted_empty_all_rows_are_lost_and_not_absent(
    backend: Backend, bundle: Bundle, redis_server: RedisServer
) -> None:
    assert fetch_all(backend, bundle).error is None
    redis_server.stop()
    assert "cannot be reached" in str(fetch_all(backend, bundle).error)
    redis_server.start()
    fetched = fetch_all(backend, bundle)
    assert (fetched.status == UNAVAILABLE).all()
    assert "has lost page" in str(fetched.error)
    publish(bundle.folder, backend)
    assert fetch_all(backend, bundle).error is None


@pytest.mark.parametrize("how", ["CLIENT PAUSE", "SIGSTOP"])
def test_paused_beyond_the_deadline(backend: Backend, bundle: Bundle, redis_server: RedisServer, how: str) -> None:
    assert fetch_all(backend, bundle).error is None
    if how == "SIGSTOP":
        redis_server.pause()
    else:
        with redis_server.client() as client:
            client.execute_command("CLIENT", "PAUSE", "500", "ALL")
    fetched = fetch_all(backend, bundle, timeout=0.1)
    assert (fetched.status == UNAVAILABLE).all()
    assert f"{backend.address} did not answer within 0.1 s" in str(fetched.error)
    redis_server.resume()
    assert fetch_all(backend, bundle).error is None  # a late answer is nobody else's


@pytest.mark.parametrize("unix", [False, True])
def test_a_server_that_takes_no_connections(bundle: Bundle, tmp_path: Path, unix: bool) -> None:
    """Its queue of connections is full: TCP is not answered at all, a unix socket says that one may come again."""
    place = str(tmp_path / "s") if unix else ("127.0.0.1", 0)
    with socket.create_server(place, family=socket.AF_UNIX if unix else socket.AF_INET, backlog=0) as listener:
        waiting = [socket.socket(listener.family) for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        url = f"redis+unix://{place}" if unix else f"redis://127.0.0.1:{listener.getsockname()[1]}"
        record = Record(namespace(bundle.manifest), bundle.manifest)
        batch = batch_of(bundle.manifest, {"item": np.arange(9)})
        with RedisReader(parse_redis_url(f"{url}?connect_timeout=0.2&timeout=30")) as reader:
            began = time.monotonic()
            fetched = reader.fetch(record, batch)
            assert time.monotonic() - began < 10
            assert f"{reader.address} did not answer within 0.2 s" in str(fetched.error)
        for one in waiting:
            one.close()


def test_a_server_that_loads_its_data(backend: Backend, bundle: Bundle, redis_server: RedisServer) -> None:
    assert fetch_all(backend, bundle).error is None
    with redis_server.client() as client:
        client.save()
    redis_server.stop()
    redis_server.start("--key-load-delay", "4000", "--loading-process-events-interval-bytes", "1024")
    fetched = fetch_all(backend, bundle)
    assert (fetched.status == UNAVAILABLE).all()
    assert f"{backend.address} answered: LOADING" in str(fetched.error)
    with redis_server.client() as client:
        while client.info("persistence")["loading"]:
            time.sleep(0.02)
    loaded = time.monotonic()
    while fetch_all(backend, bundle).error is not None:
        assert time.monotonic() - loaded < SECONDS


def test_more_callers_than_connections(redis_server: RedisServer, bundle: Bundle) -> None:
    with open_backend(f"{redis_server.url}?connections=2") as backend:
        publish(bundle.folder, backend)
        with ThreadPoolExecutor(8) as threads:
            fetched = list(threads.map(lambda _: fetch_all(backend, bundle), range(32)))
        assert all(one.error is None for one in fetched)
        with redis_server.client() as client:
            ours = [one for one in client.client_list() if one["cmd"] == "getrange"]
        assert len(ours) <= 2
        redis_server.pause()
        with ThreadPoolExecutor(2) as threads:
            long = [threads.submit(fetch_all, backend, bundle, timeout=1) for _ in range(2)]
            time.sleep(0.3)
            late = fetch_all(backend, bundle, timeout=0.1)
            assert f"all 2 connections to {backend.address} were in use for 0.1 s" in str(late.error)
            assert all("did not answer within" in str(one.result().error) for one in long)
        redis_server.resume()
        assert fetch_all(backend, bundle).error is None


_FORK = """
import os, sys
import numpy as np
from embedding_store.batch import batch_of
from embedding_store.open import open_backend

backend = open_backend(sys.argv[1])
batch = batch_of(backend.manifest("demo@1"), {"item": np.arange(5000)})
rows = backend.fetch("demo@1", batch).rows.tobytes()
child = os.fork()
same = all(backend.fetch("demo@1", batch).rows.tobytes() == rows for _ in range(100))
if child == 0:
    os._exit(not same)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
"""


def test_a_forked_child_has_connections_of_its_own(backend: Backend, redis_server: RedisServer) -> None:
    command = [sys.executable, "-c", _FORK, redis_server.url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
