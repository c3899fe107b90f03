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
        self._unix_server: asyncio.Server | None = None
        self._tcp: socket.socket | None = None
        self._tcp_server: asyncio.Server | None = None
        self._stale = False  # the TCP server has not the TLS context that was read last
        self._failure = ""  # why the files are not in use, as was logged
        self.addresses: list[str] = []

    async def open(self) -> None:
        """Raises StoreUnavailable where it cannot listen; `close` is to be called in any case."""
        if self._options.socket is not None:
            self._unix = UnixListener(self._options.socket, self._options.socket_mode)
            loop = asyncio.get_running_loop()
            self._unix_server = await loop.create_unix_server(self._connection, sock=self._unix.socket)
            self.addresses.append(self._unix.address)
        if self._options.listen is not None:
            await self._open_tcp(self._options.listen)

    async def _open_tcp(self, endpoint: Endpoint) -> None:
        self._tcp, tls = listen_tcp(*endpoint), self._options.tls
        address = tcp_address(self._tcp) if tls is None else tcp_address(self._tcp).replace("tcp://", "tls://")
        if not self._options.guarded and not is_loopback(self._tcp):
            _log.warning("anybody who reaches %s may read: no password is set", address)
        self._tcp_server = await self._serve_tcp(self._tcp)
        self.addresses.append(address)

    async def _serve_tcp(self, listener: socket.socket) -> asyncio.Server:
        """Accepts on a copy of the listener, which is closed with the server."""
        tls, copy = self._options.tls, listener.dup()
        try:
            return await asyncio.get_running_loop().create_server(
                self._connection,
                sock=copy,
                ssl=None if tls is None else tls.context,
                ssl_handshake_timeout=None if tls is None else HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=None if tls is None else SHUTDOWN_SECONDS,
            )
        except BaseException:
            copy.close()
            raise

    async def follow_files(self) -> None:
        """Reads the TLS files anew when they have changed, until it is cancelled. Connections that are made go on."""
        while self._options.tls is not None:
            await asyncio.sleep(self._options.poll_seconds or _FILES_SECONDS)
            try:
                self._stale |= self._options.tls.reload()
            except (OSError, ValueError) as error:
                self._report(f"the TLS files have changed and cannot be used, those before stay in use: {error}")
                continue
            if self._stale:
                await self._serve_anew()
            else:
                self._failure = ""

    async def _serve_anew(self) -> None:
        """TCP by the TLS context that was read last. Where that fails all is as before, and tried again."""
        if self._tcp is None:
            return
        try:
            server = await self._serve_tcp(self._tcp)
        except OSError as error:
            self._report(f"cannot listen anew, new connections get the TLS files of before until then: {error}")
            return
        before, self._tcp_server = self._tcp_server, server
        if before is not None:
            before.close()  # who has not been accepted yet waits at the listener, of which both have a copy
        self._stale, self._failure = False, ""
        _log.info("new connections get the TLS certificate that was read just now")

    def _report(self, failure: str) -> None:
        """The same once: it is tried again at every look."""
        if failure != self._failure:
            _log.warning("%s", failure)
        self._failure = failure

    def remove_file(self) -> None:
        """Whoever comes now finds no sidecar, rather than one that ends."""
        if self._unix is not None:
            self._unix.remove()

    def close(self) -> None:
        self.remove_file()
        for server in (self._unix_server, self._tcp_server):
            if server is not None:
                server.close()
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None
