"""The sidecar process: warm the cache, listen, answer, drain.

start     refuse a socket on which another process answers; warm the active releases; listen; print `ready …`
running   a release that is activated meanwhile is warmed beside its first look-ups
SIGTERM   (or SIGINT) stop accepting, answer what has come, close, remove the socket file, exit 0
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from embedding_store import resp
from embedding_store.served import ServedLookup
from embedding_store.sidecar_commands import Commands
from embedding_store.sidecar_connection import DRAIN_QUIET, Connection
from embedding_store.sidecar_socket import UnixListener, is_loopback, listen_tcp, refuse_taken, tcp_address

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarOptions:
    socket: Path | None = None
    socket_mode: int = 0o660
    listen: tuple[str, int] | None = None  # host, port; port 0 takes a free one
    max_frame: int = 16 << 20  # bytes of one command, and of one reply
    threads: int = 8  # look-ups that may wait for a network at the same time
    drain_seconds: float = 5.0  # after which connections that are still busy are cut
    password: str | None = field(default=None, repr=False)


def run_sidecar(store: ServedLookup, options: SidecarOptions, ready: Callable[[str], None] = print) -> None:
    """Serves `store` until SIGTERM or SIGINT. `ready` is called once, with the line that says where it listens.

    Raises StoreUnavailable where it cannot listen or cannot reach the store.
    """
    import uvloop  # an inference host has it; a training host that only imports this package need not

    uvloop.run(Sidecar(store, options).run(ready))


class Sidecar:
    def __init__(self, store: ServedLookup, options: SidecarOptions) -> None:
        if options.socket is None and options.listen is None:
            raise ValueError("a sidecar needs a socket path or HOST:PORT to listen on; neither was given")
        self._store = store
        self._options = options
        self._threads = ThreadPoolExecutor(options.threads, "sidecar")
        self._server: dict[str, object] = {"version": _version(), "addresses": ""}
        self._commands = Commands(
            store,
            threads=self._threads,
            max_frame=options.max_frame,
            password=options.password.encode() if options.password is not None else None,
            server=self._server,
        )
        self._connections: set[Connection] = set()
        self._stop = asyncio.Event()

    async def run(self, ready: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        with self._threads:
            if self._options.socket is not None:
                refuse_taken(self._options.socket)  # before the warming, which may take a while
            warmed = await self._warm()
            gc.collect()
            gc.freeze()  # what lives as long as the process is not walked again by every full collection
            if not self._stop.is_set():
                await self._serve(lambda addresses: ready(f"ready: {addresses} ({warmed})"))

    async def _warm(self) -> str:
        loop = asyncio.get_running_loop()
        began, rows = time.perf_counter(), 0
        releases = await loop.run_in_executor(self._threads, self._store.releases)
        active = [entry.release for entry in releases if entry.active]
        for release in active:
            if not self._stop.is_set():
                rows += await loop.run_in_executor(
                    self._threads, functools.partial(self._commands.lookups.warm, release)
                )
        names = ", ".join(active) or "no active release"
        return f"{names}; warmed {rows:,} rows in {time.perf_counter() - began:.2f} s"

    async def _serve(self, listening: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        unix, servers, addresses = None, [], []
        try:
            if self._options.socket is not None:
                unix = UnixListener(self._options.socket, self._options.socket_mode)
                servers.append(await loop.create_unix_server(self._connection, sock=unix.socket))
                addresses.append(unix.address)
            if self._options.listen is not None:
                listener = listen_tcp(*self._options.listen)
                if self._options.password is None and not is_loopback(listener):
                    _log.warning("anybody who reaches %s may read: no password is set", tcp_address(listener))
                servers.append(await loop.create_server(self._connection, sock=listener))
                addresses.append(tcp_address(listener))
            self._server["addresses"] = ",".join(addresses)
            listening(" ".join(addresses))
            await self._stop.wait()
            if unix is not None:
                unix.remove()  # whoever comes now finds no sidecar, rather than one that ends
            await self._drain(servers)
        finally:
            if unix is not None:
                unix.remove()
            for server in servers:
                server.close()

    def _connection(self) -> Connection:
        return Connection(self._commands, resp.CommandParser(self._options.max_frame), self._connections)

    async def _drain(self, servers: list[asyncio.Server]) -> None:
        # Connections that the kernel has made and nobody has accepted yet would be reset by closing at once.
        await asyncio.sleep(DRAIN_QUIET)
        for server in servers:
            server.close()
        deadline = time.monotonic() + self._options.drain_seconds
        while True:
            await asyncio.sleep(DRAIN_QUIET / 5)
            if not self._connections:
                return
            if time.monotonic() > deadline:
                break
            for connection in list(self._connections):
                connection.drain()
        seconds = self._options.drain_seconds
        _log.warning("%d connections were still busy after %g s", len(self._connections), seconds)
        for connection in list(self._connections):
            connection.abort()


def _version() -> str:
    try:
        return version("torchrank")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"
