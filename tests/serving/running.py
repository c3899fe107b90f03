"""Real processes for the tests: the service as its users start it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120  # numba compiles on a fresh checkout


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    log: Path

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "torchrank.cli", *map(str, arguments)]


@contextmanager
def running_service(log: Path, *arguments: str | Path) -> Iterator[Service]:
    """`torchrank serve ARGUMENTS --port 0`, from its ready line to the end of the block; stderr goes to `log`."""
    with _running(command_line("serve", *arguments, "--port", "0"), log, " on http://") as (process, line):
        yield Service(process, line.split()[-1], log)


@contextmanager
def running_sidecar(log: Path, store: str, socket: Path, *options: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = command_line("sidecar", "--store", store, "--socket", socket, "--cache-size", "1MiB", *options)
    with _running(command, log, "ready") as (process, _):
        yield process


@contextmanager
def _running(command: list[str], log: Path, ready: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if ready not in line:
                process.wait(START_SECONDS)
                raise AssertionError(f"no ready line but {line!r}; stderr:\n{log.read_text()}")
            yield process, line
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()
