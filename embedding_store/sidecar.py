"""The sidecar process: warm the cache, listen, answer, drain.

start     refuse a socket on which another process answers; warm the active releases; listen; print `ready …`
running   a release that is activated meanwhile is warmed, and told to clients after that
SIGTERM   (or SIGINT) stop accepting, answer what has come, close, remove the socket file, exit 0; what waits for a
          store that does not answer is left where it is
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version

from embedding_store.served import ServedLookup
from embedding_store.sidecar_commands import Commands
from embedding_store.sidecar_connection import DRAIN_QUIET
from embedding_store.sidecar_connections import Connections
from embedding_store.sidecar_http import Pages, serve_pages
from embedding_store.sidecar_listeners import Listeners
from embedding_store.sidecar_options import SidecarOptions
from embedding_store.sidecar_socket import listen_tcp, refuse_taken, tcp_address

_log = logging.getLogger(__name__)

_THREADS = "sidecar"  # what their names begin with
_UNPIN_SECONDS = 1.0  # that a store has for ending the pins, which would end by themselves a minute later
_THREADS_SECONDS = 0.5  # that threads have for coming back, when nobody wants their results any more


def run_sidecar(store: ServedLookup, options: SidecarOptions, ready: Callable[[str], None] = print) -> int:
    """Serves `store` until SIGTERM or SIGINT. `ready` is called once, with the line that says where it listens.

    Returns how many threads still wait for the store, which the interpreter would wait for at its own end. Raises
    StoreUnavailable where it cannot listen or cannot reach the store.
    """
    import uvloop  # an inference host has it; a training host that only imports this package need not

    sidecar = Sidecar(store, options)
    uvloop.run(sidecar.run(ready))
    return sidecar.left


class Sidecar:
    def __init__(self, store: ServedLookup, options: SidecarOptions) -> None:
        self._store = store
        self._options = options
        self._threads = ThreadPoolExecutor(options.threads, _THREADS)
        self._server: dict[str, object] = {"version": _version(), "addresses": ""}
        self._commands = Commands(
            store,
            threads=self._threads,
            max_frame=options.max_frame,
            password=options.password.encode() if options.password is not None else None,
            server=self._server,
            max_degraded_share=options.max_degraded_share,
            poll_seconds=options.poll_seconds,
        )
        self._connections = Connections(
            self._commands,
            max_frame=options.max_frame,
            limit=options.max_connections,
            idle_seconds=options.idle_seconds,
        )
        self._stop = asyncio.Event()
        self.left = 0  # threads that did not come back

    async def run(self, ready: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            if self._options.socket is not None:
                refuse_taken(self._options.socket)  # before the warming, which may take a while
            async with self._metrics():
                began = time.perf_counter()
                await self._unless_stopped(self._commands.releases.move())
                gc.collect()
                gc.freeze()  # what lives as long as the process is not walked again by every full collection
                if not self._stop.is_set():
                    warmed = self._warmed(time.perf_counter() - began)
                    await self._serve(lambda addresses: ready(f"ready: {addresses} ({warmed})"))
        finally:
            self._leave_threads()

    def _leave_threads(self) -> None:
        """Ends those that have nothing to do; the others may wait for a store that does not answer."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + _THREADS_SECONDS
        mine = [thread for thread in threading.enumerate() if thread.name.startswith(f"{_THREADS}_")]
        for thread in mine:
            thread.join(max(0.0, until - time.monotonic()))
        self.left = sum(thread.is_alive() for thread in mine)
        if self.left:
            _log.warning("%d threads still wait for the store; they are not waited for", self.left)

    def _warmed(self, seconds: float) -> str:
        rows = self._commands.releases.warmed
        return f"{', '.join(rows) or 'no active release'}; warmed {sum(rows.values()):,} rows in {seconds:.2f} s"

    async def _unless_stopped(self, work: Coroutine[None, None, object]) -> None:
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            task.result()  # raises what it raised
        task.cancel()

    @asynccontextmanager
    async def _metrics(self) -> AsyncIterator[None]:
        """From before the warming to the end of the draining, both of which are worth watching."""
        if self._options.metrics is None:
            yield
            return
        listener = listen_tcp(*self._options.metrics)
        server = await serve_pages(self._pages(), listener)
        self._server["metrics"] = address = tcp_address(listener).replace("tcp://", "http://")
        _log.info("metrics: %s/metrics", address)
        try:
            yield
        finally:
            server.close()

    def _pages(self) -> Pages:
        from embedding_store.sidecar_metrics import CONTENT_TYPE, SidecarMetrics  # prometheus-client is an extra

        commands = self._commands
        metrics = SidecarMetrics(self._store, commands.stats, commands.releases, commands.ready)

        def ready() -> tuple[HTTPStatus, str, bytes]:
            obstacle = commands.ready.obstacle
            status = HTTPStatus.SERVICE_UNAVAILABLE if obstacle else HTTPStatus.OK
            return status, "text/plain; charset=utf-8", f"{obstacle or 'ready'}\n".encode()

        return {"/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE, metrics.text()), "/ready": ready}

    async def _serve(self, listening: Callable[[str], None]) -> None:
        listeners = Listeners(self._options, self._connections.connection)
        background = [
            asyncio.ensure_future(self._commands.releases.follow()),
            asyncio.ensure_future(self._connections.close_idle()),
            asyncio.ensure_future(listeners.follow_files()),
        ]
        try:
            await listeners.open()
            self._server["addresses"] = ",".join(listeners.addresses)
            self._commands.ready.serving()
            listening(" ".join(listeners.addresses))
            await self._stop.wait()
            self._commands.ready.draining()
            listeners.remove_file()
            # Connections that the kernel has made and nobody has accepted yet would be reset by closing at once.
            await asyncio.sleep(DRAIN_QUIET)
            for task in background:  # one of which pins, and one opens listeners
                task.cancel()
            listeners.close()
            await self._connections.drain(self._options.drain_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._commands.releases.release_all(), _UNPIN_SECONDS)
        finally:
            listeners.close()
            for task in background:
                task.cancel()


def _version() -> str:
    try:
        return version("torchrank")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"
