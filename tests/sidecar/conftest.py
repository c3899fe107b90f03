"""A published release of random tables, and real sidecar processes that serve it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from embedding_store.client import SidecarClient
from embedding_store.open import open_backend
from tests.redis_server import RedisServer
from tests.sidecar.random_release import Release, make_release, put

SEED = 20240611


@pytest.fixture(scope="session")
def release() -> Release:
    print(f"seed {SEED}")
    return make_release("v1", SEED)


@pytest.fixture(scope="session")
def store_url(release: Release, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    with open_backend(f"memmap://{folder}") as backend:
        put(backend, release)
    return f"memmap://{folder}"


@pytest.fixture
def redis_store(redis_server: RedisServer, release: Release) -> RedisServer:
    """The same release in a Redis of the test's own."""
    with open_backend(redis_server.url) as backend:
        put(backend, release)
    return redis_server


@dataclass
class Process:
    """A running sidecar. `ready` is the line it printed."""

    process: subprocess.Popen[str]
    ready: str
    socket: Path
    clients: list[SidecarClient] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    @property
    def tcp_port(self) -> int:
        return int(self.ready.partition("://127.0.0.1:")[2].split()[0])

    def client(self, password: str | None = None, connections: int = 8, timeout: float = 20.0) -> SidecarClient:
        client = SidecarClient(self.address, password=password, connections=connections, timeout=timeout)
        self.clients.append(client)
        return client

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """The same, of a process that was told to end: a second signal could meet the interpreter's own end."""
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def start_process(url: str, socket: Path, *options: str, environment: Mapping[str, str] | None = None) -> Process:
    """Waits for the readiness line. Raises RuntimeError with what the process wrote where it ends instead."""
    command = [sys.executable, "-m", "torchrank.cli", "sidecar", "--store", url, "--socket", str(socket), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stdout is not None
    deadline = time.monotonic() + 120  # kernels compile on a first run
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.5)[0]:
            line = process.stdout.readline()
            if line.startswith("ready"):
                return Process(process, line.strip(), socket)
            if not line:
                break
    process.kill()
    raise RuntimeError(process.communicate()[1])


Starter = Callable[..., Process]


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """Not under pytest's tmp_path: a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="torchrank-sidecar-") as folder:
        yield Path(folder)


@pytest.fixture
def start(store_url: str, socket_folder: Path) -> Iterator[Starter]:
    """start(*options, url=…, socket=…, environment=…): a sidecar of this test's own."""
    started: list[Process] = []

    def begin(*options: str, url: str = store_url, socket: Path | None = None, **others: Mapping[str, str]) -> Process:
        process = start_process(url, socket or socket_folder / "s.sock", *options, **others)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.close()


@pytest.fixture(scope="module")
def sidecar(store_url: str) -> Iterator[Process]:
    """One sidecar for the tests of a module that leave it as it was; unix socket and TCP."""
    with tempfile.TemporaryDirectory(prefix="torchrank-sidecar-") as folder:
        process = start_process(store_url, Path(folder) / "s.sock", "--listen", "127.0.0.1:0")
        yield process
        process.close()
