"""A real redis-server for tests: own directory, free port and unix socket, nothing saved."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import redis


class RedisServer:
    """`start` and `stop` may alternate; port and socket stay the same, the data do not. `pause` stops its answers."""

    def __init__(self, *options: str, tls: tuple[Path, Path, Path] | None = None) -> None:
        """`options` go to the server, as `--maxmemory 10mb`. tls: files of authority, certificate and key, for
        connections to `tls_port`; clients need no certificate unless an option says so."""
        executable = shutil.which("redis-server")
        if executable is None:
            raise RuntimeError("no redis-server on PATH, and this test needs one: apt-get install redis-server")
        # Not under pytest's tmp_path: a socket's path may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="torchrank-redis-"))
        self.socket = self.folder / "redis.sock"
        self.port = free_port()
        if tls is not None:
            self.tls_port = free_port()
            files = zip(("ca-cert", "cert", "key"), tls, strict=True)
            options = (
                "--tls-port", str(self.tls_port), "--tls-auth-clients", "no",
                *(part for name, path in files for part in (f"--tls-{name}-file", str(path))), *options,
            )  # fmt: skip
        self._command = [
            executable, "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket),
            "--dir", str(self.folder), "--save", "", "--appendonly", "no", *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis+unix://{self.socket}"

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        """Past everything of ours, to look at what is really stored."""
        return redis.Redis(unix_socket_path=str(self.socket), protocol=2)

    def start(self, *options: str) -> None:
        """`options`: for this time only."""
        log = self.folder / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen([*self._command, *options], stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 20
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"redis-server does not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)

    def stop(self) -> None:
        """As by kill -9."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Connections are accepted by the kernel, but nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                probe.sendall(b"PING\r\n")
                return probe.recv(1) in (b"+", b"-")  # PONG, or an error that asks for a password
        except OSError:
            return False


def free_port() -> int:
    """Below those that the system gives to connections: one of these may be taken before a server listens on it."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


_given: set[int] = set()  # in this process, perhaps to servers that do not listen yet
