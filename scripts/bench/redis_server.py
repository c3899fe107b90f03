"""A redis-server of a benchmark's own."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def redis_server(folder: Path) -> Iterator[Path]:
    """A fresh redis-server; gives its socket."""
    socket = folder / "redis.sock"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    try:
        while not socket.exists():
            if server.poll() is not None:
                raise SystemExit("redis-server did not start")
            time.sleep(0.02)
        yield socket
    finally:
        server.terminate()
        server.wait()
