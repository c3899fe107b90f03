"""A sidecar is killed, stopped, drained and restarted while clients ask it, and its store breaks behind it."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedding_store.client import SidecarClient
from embedding_store.lookup import UNAVAILABLE
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.releases import activate
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.faults.traffic import RESUMES_WITHIN, Traffic
from tests.redis_server import RedisServer
from tests.sidecar.conftest import Process, start_process

TABLES = (
    TestTable("item", "fp16", rows=4000, dim=16, hot=50, default=True),
    TestTable("user", "fp32", rows=3000, dim=8, hot=50, default=True),
)
CACHE = ("--cache-size", "25kB")  # a tenth of the rows: every look-up has misses


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", 6, tables=TABLES)


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torchrank-sidecar-") as folder:
        yield Path(folder) / "s.sock"


def published(url: str, bundle: Bundle) -> None:
    with open_backend(url) as backend:
        publish(bundle.folder, backend)
        activate(backend, bundle.name)


@contextmanager
def running(url: str, socket: Path, *options: str) -> Iterator[Process]:
    process = start_process(url, socket, *CACHE, *options)
    try:
        yield process
    finally:
        process.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again(bundle: Bundle, socket: Path, tmp_path: Path, how: signal.Signals) -> None:
    url = f"memmap://{tmp_path / 'store'}"
    published(url, bundle)
    with SidecarClient(f"unix://{socket}") as client:
        with running(url, socket) as first, Traffic(client, bundle).running(threads=3) as traffic:
            first.stop(how)
            traffic.wait_until_degraded()
            with running(url, socket):
                traffic.wait_until_whole()
        assert traffic.errors
        assert all(str(socket) in error for error in traffic.errors), traffic.errors


def test_stopped_beyond_the_deadline(bundle: Bundle, socket: Path, tmp_path: Path) -> None:
    url = f"memmap://{tmp_path / 'store'}"
    published(url, bundle)
    with SidecarClient(f"unix://{socket}") as client, running(url, socket) as sidecar:
        with Traffic(client, bundle).running(threads=3) as traffic:
            sidecar.process.send_signal(signal.SIGSTOP)
            traffic.wait_until_degraded()
            sidecar.process.send_signal(signal.SIGCONT)
            traffic.wait_until_whole()
        assert all("no answer within" in error or "busy" in error for error in traffic.errors), traffic.errors


@pytest.mark.parametrize("policy", ["cache,error", "cache,default"])
def test_its_redis_is_killed_and_comes_back(
    redis_server: RedisServer, bundle: Bundle, socket: Path, policy: str
) -> None:
    """Empty at first; then the release is published again. The client learns row by row, or by an error."""
    published(redis_server.url, bundle)
    with (
        SidecarClient(f"unix://{socket}") as client,
        running(redis_server.url, socket, "--on-unavailable", policy),
        Traffic(client, bundle).running(threads=3) as traffic,
    ):
        redis_server.stop()
        traffic.wait_until_degraded()
        redis_server.start()
        published(redis_server.url, bundle)
        traffic.wait_until_whole()
    if policy == "cache,default":
        assert traffic.flagged[UNAVAILABLE] > 0
        assert not traffic.errors
    else:
        assert traffic.flagged[UNAVAILABLE] == 0
        assert all(error.startswith("StoreUnavailable") for error in traffic.errors)


def test_its_redis_does_not_answer(redis_server: RedisServer, bundle: Bundle, socket: Path) -> None:
    """The request's deadline goes through client and sidecar down to the server's socket."""
    published(redis_server.url, bundle)
    with (
        SidecarClient(f"unix://{socket}") as client,
        running(redis_server.url, socket, "--on-unavailable", "cache,default"),
        Traffic(client, bundle).running(threads=3) as traffic,
    ):
        redis_server.pause()
        traffic.wait_until_degraded()
        began = time.monotonic()
        client.ping()  # the sidecar itself is well
        assert time.monotonic() - began < RESUMES_WITHIN
        redis_server.resume()
        traffic.wait_until_whole()
