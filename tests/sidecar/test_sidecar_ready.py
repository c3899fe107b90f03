"""Readiness, INFO and /metrics of real sidecars, and the sliding share that readiness goes by."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from embedding_store import resp
from embedding_store.errors import StoreError
from embedding_store.protocol import encode_request
from embedding_store.sidecar_ready import WINDOW_SECONDS, DegradedShare, Readiness
from tests.sidecar.conftest import start_process
from tests.sidecar.raw_socket import connect, read_all
from tests.sidecar.test_sidecar_client import until


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:  # a URL of this test's own sidecar
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metrics(url: str) -> dict[tuple[str, str], float]:
    """(name, its labels' values joined in the order of the labels' names) -> value."""
    status, text = get(f"{url}/metrics")
    assert status == 200
    return {
        (sample.name.removeprefix("torchrank_sidecar_"), ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_degraded_share_is_that_of_the_last_seconds() -> None:
    """Against a list of everything that happened, over 2,000 random steps of a clock."""
    rng = np.random.default_rng(17)
    clock = Clock()
    share = DegradedShare(clock)
    history: list[tuple[int, int, int]] = []
    for _ in range(2000):
        clock.now += float(rng.choice((0.0, 0.3, 1.0, 4.0, 30.0), p=(0.4, 0.4, 0.1, 0.09, 0.01)))
        rows = int(rng.integers(0, 50))
        degraded = int(rng.integers(0, rows + 1))
        share.record(rows, degraded)
        history.append((int(clock.now), rows, degraded))
        recent = [(rows, degraded) for second, rows, degraded in history if second > int(clock.now) - WINDOW_SECONDS]
        expected = sum(degraded for _, degraded in recent) / max(1, sum(rows for rows, _ in recent))
        assert share.share == pytest.approx(expected)
    clock.now += WINDOW_SECONDS
    assert share.share == 0


def test_phases_of_readiness() -> None:
    clock = Clock()
    share = DegradedShare(clock)
    ready = Readiness(share, 0.2)
    assert ready.obstacle == "warming"
    ready.serving()
    assert ready.obstacle == ""
    share.record(100, 20)
    assert ready.obstacle == ""
    share.record(0, 1)
    assert ready.obstacle == "degraded: 21.0% of the rows of the last 10 s, more than 20.0%"
    clock.now += WINDOW_SECONDS
    assert ready.obstacle == ""
    ready.draining()
    assert ready.obstacle == "draining"


def test_ready_and_draining(start) -> None:  # type: ignore[no-untyped-def]
    process = start("--metrics", "127.0.0.1:0", "--drain-seconds", "20")
    info = process.client().info()
    assert info["ready"] == "1"
    assert "not_ready" not in info
    url = info["metrics"]
    assert get(f"{url}/ready") == (200, "ready\n")
    frame = resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"category": np.arange(5)}))
    with connect(process.socket) as raw:
        raw.sendall(resp.command(b"TR.READY") + frame[:40])
        assert raw.recv(100) == b"+READY\r\n"
        process.process.send_signal(signal.SIGTERM)
        until(lambda: get(f"{url}/ready") == (503, "draining\n"), "it drains")
        raw.sendall(frame[40:] + resp.command(b"TR.READY"))
        received = read_all(raw)
        assert received.startswith(b"$80\r\n")
        assert received.endswith(b"\r\n-NOTREADY draining\r\n")
    assert process.wait()[0] == 0


def test_not_ready_while_it_warms(start, redis_store) -> None:  # type: ignore[no-untyped-def]
    """Redis stands still: the metrics' port answers before the sidecar listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with ThreadPoolExecutor(1) as pool:
        redis_store.pause()
        try:
            starting = pool.submit(start, "--metrics", url.removeprefix("http://"), url=f"{redis_store.url}?timeout=60")
            until(lambda: _listens(url), "the metrics' port answers")
            assert get(f"{url}/ready") == (503, "warming\n")
            assert metrics(url)["ready", ""] == 0
        finally:
            redis_store.resume()
        starting.result(60)
    assert get(f"{url}/ready") == (200, "ready\n")


def _listens(url: str) -> bool:
    try:
        get(url)
    except urllib.error.URLError:
        return False
    return True


def test_not_ready_where_too_many_rows_are_degraded(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--metrics", "127.0.0.1:0", "--max-degraded-share", "0.3", url=redis_store.url)
    client = process.client()
    url = client.info()["metrics"]
    cold = np.setdiff1d(np.arange(5000), release.hot["item"])
    client.lookup("feed@v1", {"item": release.hot["item"][:100]})
    redis_store.pause()
    try:
        with pytest.raises(StoreError):
            client.lookup("feed@v1", {"item": cold[:30]}, timeout=0.2)
        until(lambda: client.info()["degraded_share"] == "0.2308", "30 of 130 rows are degraded")
        assert get(f"{url}/ready") == (200, "ready\n")
        with pytest.raises(StoreError):
            client.lookup("feed@v1", {"item": cold[:70]}, timeout=0.2)
        until(lambda: get(f"{url}/ready")[0] == 503, "100 of 200 are degraded")
        assert re.fullmatch(r"degraded: 50\.0% of the rows .*\n", get(f"{url}/ready")[1])
        with redis.Redis(unix_socket_path=str(process.socket)) as other:
            with pytest.raises(redis.ResponseError, match=r"NOTREADY degraded: 50\.0%"):
                other.execute_command("TR.READY")
            assert other.info("server")["ready"] == 0
    finally:
        redis_store.resume()
    client.lookup("feed@v1", {"item": release.hot["item"]})  # 2,500 rows that are well
    assert get(f"{url}/ready") == (200, "ready\n")


def test_metrics(start, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--metrics", "127.0.0.1:0", "--max-connections", "2")
    client = process.client(connections=1)
    url = client.info()["metrics"]
    before = metrics(url)
    hot = release.hot["item"][:100]
    for _ in range(3):
        client.lookup("feed@v1", {"item": hot, "user": np.array([0, 1, -7])})
    with pytest.raises(StoreError):
        client.lookup("feed@v9", {"item": hot})
    with connect(process.socket), connect(process.socket) as beyond:
        assert read_all(beyond).startswith(b"-ERR max number")
        after = metrics(url)

    def grown(name: str, labels: str = "") -> float:
        return after[name, labels] - before.get((name, labels), 0)

    assert grown("rows_total", "found") == 306
    assert grown("rows_total", "absent") == 3
    assert grown("rows_total", "unavailable") == grown("rows_total", "stale") == 0
    assert grown("lookup_seconds_count") == grown("lookup_seconds_bucket", "+Inf") == 3
    assert 0 < grown("lookup_seconds_sum") < 30
    assert grown("cache_hits_total", "feed@v1,item") == 300  # warmed before it said ready
    assert grown("cache_hits_total", "feed@v1,user") + grown("cache_misses_total", "feed@v1,user") == 9
    assert grown("errors_total", "UNKNOWNRELEASE") == grown("errors_total", "ERR") == 1
    assert grown("connections_rejected_total") == 1
    assert after["connections", ""] == 2
    assert after["ready", ""] == 1
    assert after["queue_depth", ""] == after["deadline_misses_total", ""] == 0
    assert after["release_warm_rows", "1,feed,feed@v1"] == 2968
    assert 0 < after["cache_bytes", ""] <= after["cache_capacity_bytes", ""] == 512 << 20
    assert after["process_resident_memory_bytes", ""] > 1 << 20
    buckets = [value for (name, labels), value in after.items() if name == "lookup_seconds_bucket"]
    assert buckets == sorted(buckets)


def test_metrics_of_a_store_that_is_late(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--metrics", "127.0.0.1:0", url=redis_store.url)
    client = process.client()
    url = client.info()["metrics"]
    cold = np.setdiff1d(np.arange(5000), release.hot["item"])
    client.lookup("feed@v1", {"item": cold[:50]})
    found = metrics(url)
    node = next(labels for name, labels in found if name == "fetch_seconds_count")
    assert node.startswith("redis+unix://")
    assert found["fetch_seconds_count", node] >= 1
    assert found["fetch_seconds_bucket", f"+Inf,{node}"] == found["fetch_seconds_count", node]
    assert found["node_open", node] == found["fetch_failures_total", node] == 0
    redis_store.pause()
    try:
        with connect(process.socket) as raw:
            raw.sendall(resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": cold[100:150]}, 0.5)))
            until(lambda: metrics(url)["queue_depth", ""] == 1, "the look-up waits")
            assert raw.recv(1000).startswith(b"-UNAVAILABLE ")
    finally:
        redis_store.resume()
    found = metrics(url)
    assert found["queue_depth", ""] == 0
    assert found["deadline_misses_total", ""] == 1
    assert found["errors_total", "UNAVAILABLE"] == 1


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"HEAD /ready HTTP/1.1\r\n\r\n", 200),
        (b"GET /ready?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /ready HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", 400),
        (bytes(range(256)) + b"\r\n\r\n", 400),
    ],
)
def test_what_else_is_asked_over_http(watched: str, request_bytes: bytes, status: int) -> None:
    host, port = watched.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as raw:
        raw.sendall(request_bytes)
        answer = http.client.HTTPResponse(raw, method=request_bytes[:4].decode("ascii", "replace").strip())
        answer.begin()
        assert answer.status == status
        assert answer.getheader("Connection") == "close"
        body = answer.read()
        assert (len(body) == 0) is (status in (400, 405) or request_bytes.startswith(b"HEAD"))


@pytest.fixture(scope="module")
def watched(store_url: str) -> Iterator[str]:
    """The URL of a sidecar's metrics."""
    with tempfile.TemporaryDirectory(prefix="torchrank-sidecar-") as folder:
        process = start_process(store_url, Path(folder) / "s.sock", "--metrics", "127.0.0.1:0")
        yield process.client().info()["metrics"]
        process.close()
