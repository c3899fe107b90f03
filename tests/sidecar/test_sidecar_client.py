"""SidecarClient against real sidecars: values, threads, restarts, timeouts."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.client import SidecarClient
from embedding_store.errors import StoreUnavailable, UnknownRelease, UnknownTable
from embedding_store.lookup import EmbeddingLookup


def check(lookup: EmbeddingLookup, release, ids: dict[str, NDArray[np.int64]], **options: float) -> None:  # type: ignore[no-untyped-def]
    """Every row equals plain numpy indexing, and so does every status."""
    reply = lookup.lookup(release.manifest.name, ids, **options)
    assert reply.release == release.manifest.name
    assert list(reply.tables) == list(ids)
    for name, wanted in ids.items():
        table = reply.tables[name]
        np.testing.assert_array_equal(table.rows[table.index].view(np.float16), release.expected(name, wanted))
        known = (wanted >= 0) & (wanted < len(release.tables[name]))
        np.testing.assert_array_equal(table.status[table.index] == 0, known)
        assert len(table.rows) == len(table.status) == len(np.unique(wanted))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


@pytest.mark.parametrize("seed", range(20))
def test_values(sidecar, release, seed: int) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    ids = {
        name: rng.integers(-5, len(rows) + 5, rng.choice((0, 1, 40, 2000)))
        for name, rows in release.tables.items()
        if rng.random() < 0.8
    }
    check(sidecar.client(), release, ids)


def test_unusual_ids(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    client = sidecar.client()
    ends = np.array([np.iinfo(np.int64).max, np.iinfo(np.int64).min, -1, 0])
    check(client, release, {"item": ends})
    read_only = np.arange(100)
    read_only.setflags(write=False)
    check(client, release, {"item": read_only, "user": np.arange(200)[::3]})
    check(client, release, {"item": np.empty(0, np.int64)})
    check(client, release, {})
    check(client, release, {"item": np.arange(200_000) % 5003})  # 6 MB of ids become 160 kB of rows


def test_over_tcp(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    with SidecarClient(f"tcp://127.0.0.1:{sidecar.tcp_port}") as client:
        check(client, release, release.random_ids(np.random.default_rng(3), 5000))


def test_rows_are_views_into_the_buffer_they_were_received_in(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    client = sidecar.client()
    first = client.lookup("feed@v1", release.random_ids(np.random.default_rng(4), 501)).tables
    bases = {id(table.rows.base) for table in first.values()} | {id(table.status.base) for table in first.values()}
    assert len(bases) == 1
    assert all(table.rows.ctypes.data % 8 == 0 for table in first.values())
    before = {name: table.rows.copy() for name, table in first.items()}
    client.lookup("feed@v1", release.random_ids(np.random.default_rng(5), 501))
    for name, rows in before.items():  # a later reply does not overwrite an earlier one
        np.testing.assert_array_equal(first[name].rows, rows)


def test_manifest_and_releases(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    client = sidecar.client()
    assert client.manifest() == client.manifest(model="feed") == client.manifest("feed@v1") == release.manifest
    assert [(entry.release, entry.active) for entry in client.releases()] == [("feed@v1", True)]
    with pytest.raises(UnknownRelease, match=f"{client.address}: no release 'feed@v2'"):
        client.manifest("feed@v2")
    with pytest.raises(UnknownRelease, match="'shop'"):
        client.manifest(model="shop")
    with pytest.raises(UnknownRelease, match="feed@v2"):
        client.lookup("feed@v2", {"item": np.array([1])})
    with pytest.raises(UnknownTable, match="no table 'nope'; it has: item, user, category"):
        client.lookup("feed@v1", {"nope": np.array([1])})


def test_counters(start, release) -> None:  # type: ignore[no-untyped-def]
    client = start().client()
    before = client.info()
    hot = release.hot["item"][:100]
    client.lookup("feed@v1", {"item": hot, "user": np.array([0, 0, -7])})
    after = client.info()

    def grown(key: str) -> int:
        return int(after[key]) - int(before[key])

    assert grown("lookups") == 1
    assert grown("ids") == 102  # the client asks for distinct ids
    assert grown("absent") == 1
    assert grown("cache_hits") + grown("cache_misses") == 102
    assert grown("cache_hits") >= 100  # warmed before it said ready
    assert grown("lookups_offloaded") == grown("total_error_replies") == 0
    assert float(after["server_p50_us"]) > 0
    assert "tables=3,rows=5937" in after["feed@v1"]


def test_a_large_request_takes_a_thread(start, release) -> None:  # type: ignore[no-untyped-def]
    client = start().client()
    check(client, release, {"item": np.arange(4000)})
    assert client.info()["lookups_offloaded"] == "0"
    ids = np.arange(40_000) - 10_000  # all distinct, so that they are all sent
    check(client, release, {"item": ids, "user": np.arange(10)})
    assert client.info()["lookups_offloaded"] == "1"


def test_eight_threads_on_one_client(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    """Fewer sockets than threads: they queue, and nobody gets another's rows."""
    client = sidecar.client(connections=3)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                check(client, release, release.random_ids(rng, int(rng.integers(1, 400))))
        except BaseException as error:  # noqa: BLE001  # told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures[0]


def test_reconnects_after_a_restart(start, release) -> None:  # type: ignore[no-untyped-def]
    process = start()
    client = process.client()
    ids = release.random_ids(np.random.default_rng(6), 50)
    check(client, release, ids)
    assert process.stop()[0] == 0
    with pytest.raises(StoreUnavailable, match=f"unix://{process.socket} cannot be reached: No such file"):
        client.lookup("feed@v1", ids)
    again = start()
    check(client, release, ids)
    assert again.stop(signal.SIGKILL)[0] == -signal.SIGKILL  # leaves its socket file behind
    with pytest.raises(StoreUnavailable, match=f"unix://{process.socket} cannot be reached: Connection refused"):
        client.lookup("feed@v1", ids)
    start()
    check(client, release, ids)


def test_killed_under_load_and_restarted(start, release) -> None:  # type: ignore[no-untyped-def]
    """Four threads never see a wrong row; what they see meanwhile is StoreUnavailable, and after it rows again."""
    process = start()
    client = process.client(connections=4)
    stopped = threading.Event()
    answered = [0] * 4

    def work(number: int) -> int:
        rng, failed = np.random.default_rng(number), 0
        while not stopped.is_set():
            try:
                check(client, release, release.random_ids(rng, 200), timeout=5)
                answered[number] += 1
            except StoreUnavailable:
                failed += 1
                time.sleep(0.01)
        return failed

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work, number) for number in range(4)]
        for _ in range(2):
            until(lambda: min(answered) > 20, "all threads get answers")
            process.stop(signal.SIGKILL)
            process = start()
            answered[:] = [0] * 4
        until(lambda: min(answered) > 20, "all threads get answers again")
        stopped.set()
        failures = sum(future.result(30) for future in working)
    assert failures > 0


def test_a_stopped_sidecar_is_a_timeout_and_the_late_answer_is_nobodys(start, release) -> None:  # type: ignore[no-untyped-def]
    process = start()
    client = process.client(connections=1)
    check(client, release, {"item": np.arange(10)})
    os.kill(process.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"s.sock: no answer within 0\.200 s"):
            client.lookup("feed@v1", {"item": np.arange(10)}, timeout=0.2)
        assert 0.15 < time.monotonic() - began < 5
        with pytest.raises(StoreUnavailable, match="no answer within"):  # a frame that no socket buffer takes
            client.lookup("feed@v1", {"item": np.arange(500_000)}, timeout=0.2)
    finally:
        os.kill(process.process.pid, signal.SIGCONT)
    check(client, release, {"item": np.arange(20, 60)})


def test_a_full_pool_is_a_timeout(start) -> None:  # type: ignore[no-untyped-def]
    process = start()
    client = process.client(connections=1)
    client.ping()
    os.kill(process.process.pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(client.lookup, "x@y", {}, timeout=1.0)
            time.sleep(0.2)
            with pytest.raises(StoreUnavailable, match=r"all 1 connections were busy for 0\.\d+ s"):
                client.lookup("x@y", {}, timeout=0.1)
            with pytest.raises(StoreUnavailable, match="no answer within"):
                other.result(10)
    finally:
        os.kill(process.process.pid, signal.SIGCONT)


def test_nobody_there(tmp_path: Path) -> None:
    with (
        SidecarClient(f"unix://{tmp_path}/none.sock") as client,
        pytest.raises(StoreUnavailable, match=r"none\.sock cannot"),
    ):
        client.ping()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with (
            SidecarClient(f"tcp://127.0.0.1:{port}") as client,
            pytest.raises(StoreUnavailable, match=f"tcp://127.0.0.1:{port} cannot be reached: Connection refused"),
        ):
            client.ping()


def test_somebody_else_there(tmp_path: Path, redis_server, release) -> None:  # type: ignore[no-untyped-def]
    """A Redis is not a sidecar: its error is shown, not taken for an answer."""
    with (
        SidecarClient(f"unix://{redis_server.socket}") as client,
        pytest.raises(Exception, match=r"redis\.sock: unknown command"),
    ):
        client.manifest("feed@v1")


def test_a_closed_client_says_so(sidecar) -> None:  # type: ignore[no-untyped-def]
    client = sidecar.client()
    client.ping()
    client.close()
    client.close()
    with pytest.raises(StoreUnavailable, match="this client was closed"):
        client.ping()
