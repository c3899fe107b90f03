"""All connections of a sidecar: how many there may be, how long they may say nothing, how they end."""

from __future__ import annotations

import asyncio
import logging

from embedding_store import resp
from embedding_store.sidecar_commands import Commands
from embedding_store.sidecar_connection import DRAIN_QUIET, Connection
from embedding_store.sidecar_stats import SidecarStats

_log = logging.getLogger(__name__)

_LOOKS_PER_TIMEOUT = 4  # a connection is closed at most a quarter late


class Connections:
    """limit: connections at a time. idle_seconds: after which one that says nothing is closed, 0 for never."""

    def __init__(self, commands: Commands, *, max_frame: int, limit: int, idle_seconds: float) -> None:
        self._commands = commands
        self._stats: SidecarStats = commands.stats
        self._stats.connections_limit = limit
        self._max_frame = max_frame
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._open: set[Connection] = set()

    def connection(self) -> Connection:
        """For asyncio's create_server."""
        return Connection(self._commands, resp.CommandParser(self._max_frame), self)

    def admit(self, connection: Connection) -> bool:
        if len(self._open) >= self._limit:
            self._stats.connections_rejected += 1
            return False
        self._open.add(connection)
        self._stats.connections = len(self._open)
        return True

    def leave(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._stats.connections = len(self._open)

    async def close_idle(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while self._idle_seconds:
            await asyncio.sleep(self._idle_seconds / _LOOKS_PER_TIMEOUT)
            before = loop.time() - self._idle_seconds
            for connection in list(self._open):
                self._stats.connections_idle_closed += connection.close_if_idle(before)

    async def drain(self, seconds: float) -> None:
        """Answers what was asked and closes; cuts what is still busy after `seconds`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            await asyncio.sleep(DRAIN_QUIET / 5)
            if not self._open:
                return
            if loop.time() > deadline:
                break
            for connection in list(self._open):
                connection.drain()
        _log.warning("%d connections were still busy after %g s", len(self._open), seconds)
        for connection in list(self._open):
            connection.abort()
