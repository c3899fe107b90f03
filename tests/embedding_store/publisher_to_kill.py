"""A process that publishes, activates and collects, or mends, and is killed by SIGKILL within its N-th step outwards.

    python -m tests.embedding_store.publisher_to_kill BUNDLE FOLDER publish|mend

Reads lines "URL N" and prints what became of each: 0 where it ended before its N-th step, -9 where it was killed. Every
one is a fork of this process, which has loaded everything. FOLDER is for its own use.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from redis.connection import AbstractConnection

from embedding_store.buckets import encode_buckets
from embedding_store.gc import collect
from embedding_store.mend import mend
from embedding_store.open import open_backend
from embedding_store.publish import publish_and_activate

_AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}


class Steps:
    """Counts what changes a store: system calls on files, and what is sent to a server, of which half still goes."""

    def __init__(self, last: int) -> None:
        self._left = last
        self._done = False

    def watch(self, url: str) -> None:
        if not url.startswith("memmap://"):
            send = AbstractConnection.send_packed_command
            AbstractConnection.send_packed_command = self._sending(send)  # type: ignore[method-assign]
            return
        os.pwrite = self._before(os.pwrite)
        os.fsync = self._before(os.fsync)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self._step()

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self._step()
            return call(*arguments)

        return counted

    def _sending(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def counted(connection: Any, command: Any, *arguments: Any, **options: Any) -> Any:
            if self._left == 1 and connection._sock is not None:
                data = command if isinstance(command, bytes) else b"".join(command)
                connection._sock.sendall(data[: len(data) // 2])
            self._step()
            return send(connection, command, *arguments, **options)

        return counted

    def _step(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def work(url: str, bundle: Path) -> None:
    with open_backend(url) as backend:
        publish_and_activate(bundle, backend)
        collect(backend, keep=0, grace=0)


def mending(url: str, bundle: Path) -> None:
    with open_backend(url) as backend:
        mend(bundle, backend)


def main() -> None:
    bundle, folder, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    work(f"memmap://{folder}", bundle)  # compiles, or loads, all that is compiled
    encode_buckets(np.uint64(1), 0, np.zeros(1, np.int64), np.zeros((1, 4), np.uint8), np.array([0, 1]))
    for line in sys.stdin:
        url, last = line.split()
        process = os.fork()
        if process == 0:
            Steps(int(last)).watch(url)
            {"publish": work, "mend": mending}[what](url, bundle)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
