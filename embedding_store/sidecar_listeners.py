"""Where a sidecar listens: a unix socket, TCP, or both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from embedding_store.sidecar_options import Endpoint, SidecarOptions
from embedding_store.sidecar_socket import UnixListener, is_loopback, listen_tcp, tcp_address
from embedding_store.sidecar_tls import HANDSHAKE_SECONDS, SHUTDOWN_SECONDS

_log = logging.getLogger(__name__)


class Listeners:
    """connection: makes the protocol of a new connection."""

    def __init__(self, options: SidecarOptions, connection: Callable[[], asyncio.Protocol]) -> None:
        self._options = options
        self._connection = connection
        self._unix: UnixListener | None = None
        self._servers: list[asyncio.Server] = []
        self.addresses: list[str] = []

    async def open(self) -> None:
        """Raises StoreUnavailable where it cannot listen; `close` is to be called in any case."""
        if self._options.socket is not None:
            self._unix = UnixListener(self._options.socket, self._options.socket_mode)
            loop = asyncio.get_running_loop()
            self._servers.append(await loop.create_unix_server(self._connection, sock=self._unix.socket))
            self.addresses.append(self._unix.address)
        if self._options.listen is not None:
            await self._open_tcp(self._options.listen)

    async def _open_tcp(self, endpoint: Endpoint) -> None:
        listener, tls = listen_tcp(*endpoint), self._options.tls
        address = tcp_address(listener) if tls is None else tcp_address(listener).replace("tcp://", "tls://")
        if not self._options.guarded and not is_loopback(listener):
            _log.warning("anybody who reaches %s may read: no password is set", address)
        server = await asyncio.get_running_loop().create_server(
            self._connection,
            sock=listener,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=None if tls is None else SHUTDOWN_SECONDS,
        )
        self._servers.append(server)
        self.addresses.append(address)

    def remove_file(self) -> None:
        """Whoever comes now finds no sidecar, rather than one that ends."""
        if self._unix is not None:
            self._unix.remove()

    def close(self) -> None:
        self.remove_file()
        for server in self._servers:
            server.close()
