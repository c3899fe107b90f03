"""Where a sidecar listens: a unix socket, TCP, or both."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from embedding_store.sidecar_options import Endpoint, SidecarOptions
from embedding_store.sidecar_socket import UnixListener, is_loopback, listen_tcp, tcp_address
from embedding_store.sidecar_tls import HANDSHAKE_SECONDS, SHUTDOWN_SECONDS

_log = logging.getLogger(__name__)

_FILES_SECONDS = 10.0  # between two looks at the TLS files, where --poll-seconds is 0


class Listeners:
    """connection: makes the protocol of a new connection."""

    def __init__(self, options: SidecarOptions, connection: Callable[[], asyncio.Protocol]) -> None:
        self._options = options
        self._connection = connection
        self._unix: UnixListener | None = None
        self._servers: list[asyncio.Server] = []  # that of TCP is the last
        self._tcp: socket.socket | None = None
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
        self._tcp, tls = listen_tcp(*endpoint), self._options.tls
        address = tcp_address(self._tcp) if tls is None else tcp_address(self._tcp).replace("tcp://", "tls://")
        if not self._options.guarded and not is_loopback(self._tcp):
            _log.warning("anybody who reaches %s may read: no password is set", address)
        self._servers.append(await self._serve_tcp(self._tcp))
        self.addresses.append(address)

    async def _serve_tcp(self, listener: socket.socket) -> asyncio.Server:
        """Accepts on a copy of the listener, which is closed with the server."""
        tls = self._options.tls
        return await asyncio.get_running_loop().create_server(
            self._connection,
            sock=listener.dup(),
            ssl=None if tls is None else tls.context,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=None if tls is None else SHUTDOWN_SECONDS,
        )

    async def follow_files(self) -> None:
        """Reads the TLS files anew when they have changed, until it is cancelled. Connections that are made go on."""
        while self._options.tls is not None:
            await asyncio.sleep(self._options.poll_seconds or _FILES_SECONDS)
            try:
                if self._options.tls.reload() and self._tcp is not None:
                    before = self._servers.pop()
                    self._servers.append(await self._serve_tcp(self._tcp))
                    before.close()  # who has not been accepted yet waits at the listener, of which both have a copy
                    _log.info("new connections get the TLS certificate that was read just now")
            except (OSError, ValueError) as error:
                _log.warning("the TLS files have changed and cannot be used, those before stay in use: %s", error)

    def remove_file(self) -> None:
        """Whoever comes now finds no sidecar, rather than one that ends."""
        if self._unix is not None:
            self._unix.remove()

    def close(self) -> None:
        self.remove_file()
        for server in self._servers:
            server.close()
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None
