"""One connection of the sidecar: bytes to commands, replies to bytes, in the order in which they were asked.

A connection runs one command at a time. While one waits in a thread, or for its turn, or the peer does not read its
replies, nothing more is read from the socket: a peer can make the sidecar hold one frame and a few replies, not more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from embedding_store import resp
from embedding_store.errors import ProtocolError
from embedding_store.protocol import TOO_MANY_CLIENTS
from embedding_store.sidecar_commands import Commands
from embedding_store.sidecar_session import Reply

if TYPE_CHECKING:
    from embedding_store.sidecar_connections import Connections

_TURN = 64  # commands of one connection before the others get theirs
_LINGER = 1.0  # seconds for which a peer that broke the protocol may go on sending
_WRITE_BUFFER = 1 << 20  # bytes of unread replies from which on nothing more is read; a usual reply stays below
DRAIN_QUIET = 0.05  # seconds that a connection may still bring what was under way when draining began


class Connection(asyncio.Protocol):
    def __init__(self, commands: Commands, parser: resp.CommandParser, connections: Connections) -> None:
        self._commands = commands
        self._parser = parser
        self._connections = connections
        self._session = commands.session()
        parser.authenticated = self._session.authenticated
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._waiting = False  # a command is in a thread
        self._full = False  # the peer does not read its replies
        self._scheduled = False  # the next turn is in the loop's queue
        self._reading = True
        self._ended = False  # the peer sends nothing more
        self._drain_called = False
        self._draining = False  # the quiet time is over
        self._refused = False
        self._active = self._loop.time()  # when something last came or went

    # ---- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's
        if not self._connections.admit(self):
            self._refused = True
            self._transport.write(self._commands.refusal("ERR", TOO_MANY_CLIENTS))
            self._transport.close()
            return
        self._transport.set_write_buffer_limits(_WRITE_BUFFER)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.leave(self)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._active = self._loop.time()
        self._parser.feed(data)
        if not self._held:
            self._turn()

    def eof_received(self) -> bool:
        self._ended = True
        self._close_if_done()
        # The peer may still read: what it asked is answered first. Over TLS both directions end together.
        return self._transport.get_extra_info("ssl_object") is None

    def pause_writing(self) -> None:
        self._full = True
        self._set_reading()

    def resume_writing(self) -> None:
        self._full = False
        self._go_on()

    # ---- called by the sidecar

    def drain(self) -> None:
        """Answers what has come and closes; bytes that are on their way get `DRAIN_QUIET` seconds to arrive.

        May be called again and again.
        """
        if not self._drain_called:
            self._drain_called = True
            self._loop.call_later(DRAIN_QUIET, self._drain)

    def _drain(self) -> None:
        self._draining = True
        self._close_if_done()

    def close_if_idle(self, before: float) -> bool:
        """Closes where nothing came or went since `before` (loop time) and nobody waits: neither the peer for an
        answer, nor this side for the peer to take one. Half a command that does not go on is idleness too."""
        if self._held or self._transport.get_write_buffer_size():
            self._active = self._loop.time()
        elif self._active < before:
            self._transport.close()
            return True
        return False

    def abort(self) -> None:
        self._transport.abort()

    # ---- commands

    @property
    def _held(self) -> bool:
        return self._waiting or self._full or self._scheduled or self._transport.is_closing()

    def _turn(self) -> None:
        for _ in range(_TURN):
            try:
                command = self._parser.next()
            except ProtocolError as error:
                self._refuse(self._commands.refusal("PROTOCOL", str(error)))
                return
            if command is None:
                self._close_if_done()
                return
            reply = self._commands.answer(self._session, command)
            self._parser.authenticated = self._session.authenticated
            if isinstance(reply, asyncio.Future):
                self._waiting = True
                self._set_reading()
                reply.add_done_callback(self._answered)
                return
            self._transport.write(reply)
            if self._session.quit:
                self._transport.close()
                return
            if self._held:
                return
        self._scheduled = True
        self._set_reading()
        self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._scheduled = False
        self._go_on()

    def _answered(self, future: asyncio.Future[Reply]) -> None:
        self._waiting = False
        self._active = self._loop.time()
        if self._transport.is_closing():
            return
        self._transport.write(future.result())
        self._go_on()

    def _go_on(self) -> None:
        """Commands that came meanwhile, then the socket again."""
        if not self._held:
            self._turn()
        if not self._transport.is_closing():
            self._set_reading()

    def _refuse(self, reply: Reply) -> None:
        """The stream cannot be read any further. What the peer goes on sending is thrown away for a while: closing at
        once would reset the connection, and the peer might never see why."""
        self._refused = True
        self._transport.write(reply)
        self._loop.call_later(_LINGER, self._transport.close)

    def _close_if_done(self) -> None:
        """Where nothing more is to come, or to be waited for. A frame of which a part has come is waited for while
        the sidecar drains (which ends by a deadline), but not after the peer's end of file."""
        unfinished = self._parser.inside_command and not (self._ended or self._refused)
        if (self._ended or self._draining) and not self._held and not unfinished:
            self._transport.close()

    def _set_reading(self) -> None:
        wanted = not (self._waiting or self._full or self._scheduled)
        if wanted and not self._reading:
            self._transport.resume_reading()
        elif not wanted and self._reading:
            self._transport.pause_reading()
        self._reading = wanted
