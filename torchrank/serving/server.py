"""Runs an ASGI application under granian, inside this process, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable

import uvloop
from granian.constants import Interfaces
from granian.log import LogLevels
from granian.server.embed import Server
from litestar.types import ASGIApp

_START_SECONDS = 30.0


class CannotListen(OSError):
    """Somebody listens there already, or the host is not one of this machine's."""


def run(
    app: ASGIApp, host: str, port: int, *, on_ready: Callable[[str], None], on_stop: Callable[[], None], drain: float
) -> None:
    """Returns after a signal, when the requests in flight were answered, or `drain` seconds later.

    `port` 0 takes a free one. `on_ready` gets the URL once it accepts connections; `on_stop` is called at the signal.
    Raises CannotListen.
    """
    uvloop.run(_serve(app, host, _free_port(host, port), on_ready, on_stop, drain))


async def _serve(
    app: ASGIApp, host: str, port: int, on_ready: Callable[[str], None], on_stop: Callable[[], None], drain: float
) -> None:
    server = Server(
        app, host, port, interface=Interfaces.ASGINL, websockets=False, backlog=1024, log_level=LogLevels.error
    )
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopped.set)
    serving = loop.create_task(server.serve())
    stopping = loop.create_task(stopped.wait())
    await _accepting(host, port, serving)
    on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not stopped.is_set():
        raise RuntimeError("the HTTP server ended without having been asked to")
    on_stop()
    server.stop()  # closes the listener, lets the requests in flight finish
    with contextlib.suppress(TimeoutError):  # a client that never reads its answer must not keep us alive
        await asyncio.wait_for(serving, drain)


async def _accepting(host: str, port: int, serving: asyncio.Task[None]) -> None:
    """granian listens from a thread of its own, and does not say when."""
    deadline = asyncio.get_running_loop().time() + _START_SECONDS
    while True:
        if serving.done():
            serving.result()  # raises what ended it
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return


def _free_port(host: str, port: int) -> int:
    """granian binds with SO_REUSEPORT, so that a second service would silently share the port: ask first, without."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            found: int = probe.getsockname()[1]
            return found
    except OSError as error:
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
