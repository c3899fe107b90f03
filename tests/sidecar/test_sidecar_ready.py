"""Readiness of real sidecars, and the sliding share that it goes by."""

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

from embedding_store import resp
from embedding_store.errors import StoreError
from embedding_store.protocol import encode_request
from embedding_store.sidecar_ready import WINDOW_SECONDS, DegradedShare, Readiness
from tests.sidecar.conftest import start_process
from tests.sidecar.http_pages import get, metrics
from tests.sidecar.raw_socket import connect, read_all
from tests.sidecar.test_sidecar_client import until


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
