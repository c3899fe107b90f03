"""SidecarClient: an EmbeddingLookup whose store is in a sidecar, next door or on another host."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store import resp
from embedding_store.client_connection import Connection, ErrorReplyError, parse_address
from embedding_store.dedupe import dedupe_tables
from embedding_store.errors import ProtocolError, StoreUnavailable
from embedding_store.lookup import EmbeddingLookup, LookupReply, TableRows
from embedding_store.protocol import decode_reply, reply_bytes, request_head
from embedding_store.release import ReleaseEntry, ReleaseManifest

_T = TypeVar("_T")
_EMPTY = np.empty(0, np.int64)


class SidecarClient(EmbeddingLookup):
    """Thread-safe. Up to `connections` sockets, opened when needed, kept, and opened anew after a sidecar's restart.

    address: `unix:///path`, `tcp://host:port`, or a socket's path. timeout: seconds, for calls that give none of their
    own. Whatever keeps the sidecar from answering in time is a StoreUnavailable that names the address.
    """

    def __init__(
        self, address: str, *, password: str | None = None, connections: int = 8, timeout: float = 5.0
    ) -> None:
        """Does not connect yet. Raises InvalidStoreURL."""
        self._address = parse_address(address)
        self._password = password
        self._timeout = timeout
        self._connections = connections
        self._closed = False
        # Last in, first out: under little load the same few sockets stay warm. None: a socket not opened yet.
        self._idle: queue.LifoQueue[Connection | None] = queue.LifoQueue()
        for _ in range(connections):
            self._idle.put(None)
        self._manifests: dict[str, ReleaseManifest] = {}  # a release never changes, so neither does this
        self._row_bytes: dict[str, dict[str, int]] = {}
        dedupe_tables(_EMPTY, _EMPTY)  # compiles or loads the kernel now, not inside the first request's timeout

    @property
    def address(self) -> str:
        return self._address.text

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """Rows are views into the buffer that the reply was received in, one row per distinct id."""
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        if release not in self._row_bytes:
            self._fetch_manifest(release, deadline)
        widths = self._row_bytes[release]
        if not ids.keys() <= widths.keys():
            for table in ids:
                self._manifests[release].table(table)
        if not ids:
            return LookupReply(release, {})
        # One copy brings the tables' ids together, writable and contiguous: what the kernel was compiled for.
        asked = np.concatenate(list(ids.values()), dtype=np.int64, casting="same_kind")
        counts = [len(values) for values in ids.values()]
        distinct, distinct_counts, index = dedupe_tables(asked, np.array(counts, np.int64))
        shapes = {table: (count, widths[table]) for table, count in zip(ids, distinct_counts.tolist(), strict=True)}
        rows = decode_reply(self._exchange_lookup(release, distinct, shapes, deadline), release, shapes)
        tables, start = {}, 0
        for table, count in zip(ids, counts, strict=True):
            tables[table] = TableRows(*rows[table], index[start : start + count])
            start += count
        return LookupReply(release, tables)

    def manifest(self, release: str | None = None, *, model: str | None = None) -> ReleaseManifest:
        deadline = time.monotonic() + self._timeout
        if release is None:
            return self._fetch_manifest(model, deadline)
        return self._manifests.get(release) or self._fetch_manifest(release, deadline)

    def releases(self) -> list[ReleaseEntry]:
        """Every complete release of the sidecar's store. Raises StoreUnavailable."""
        return msgspec.json.decode(self._command(b"TR.RELEASES"), type=list[ReleaseEntry])

    def info(self) -> dict[str, str]:
        """The sidecar's counters: the lines of INFO."""
        lines = self._command(b"INFO").decode().splitlines()
        return dict(line.split(":", 1) for line in lines if line and not line.startswith("#"))

    def ping(self) -> None:
        """Raises StoreUnavailable where no sidecar answers."""
        self._command(b"PING")

    def close(self) -> None:
        """Closes idle sockets; one that is in use closes when its call returns."""
        self._closed = True
        while True:
            try:
                connection = self._idle.get_nowait()
            except queue.Empty:
                return
            if connection is not None:
                connection.close()

    def _fetch_manifest(self, name: str | None, deadline: float) -> ReleaseManifest:
        arguments = () if name is None else (name.encode(),)
        request = [resp.command(b"TR.INFO", *arguments)]
        content = self._on_connection(lambda connection: connection.exchange(request, deadline), deadline)
        try:
            manifest = msgspec.json.decode(content, type=ReleaseManifest)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"{self.address}: TR.INFO's reply is no release manifest: {error}") from error
        self._manifests[manifest.name] = manifest
        self._row_bytes[manifest.name] = {table.name: table.row_bytes for table in manifest.tables}
        return manifest

    def _exchange_lookup(
        self, release: str, ids: NDArray[np.int64], shapes: Mapping[str, tuple[int, int]], deadline: float
    ) -> NDArray[np.uint8]:
        counts = {table: count for table, (count, _) in shapes.items()}
        length = reply_bytes(release, shapes.values())

        def exchange(connection: Connection) -> NDArray[np.uint8]:
            head = request_head(release, counts, max(0.0, deadline - time.monotonic()))
            opening = b"*2\r\n$9\r\nTR.LOOKUP\r\n$%d\r\n%s" % (len(head) + ids.nbytes, head)
            return connection.exchange_bulk((opening, ids.view(np.uint8).data, b"\r\n"), length, deadline)

        return self._on_connection(exchange, deadline)

    def _command(self, *arguments: bytes) -> bytes:
        deadline = time.monotonic() + self._timeout
        request = [resp.command(*arguments)]
        return self._on_connection(lambda connection: connection.exchange(request, deadline), deadline)

    # ---- connections

    def _on_connection(self, exchange: Callable[[Connection], _T], deadline: float) -> _T:
        """Runs `exchange` on a socket of the pool. A kept socket may have died with an earlier sidecar: then once more
        on a new one, which is safe because nothing that this client asks changes anything."""
        began = time.monotonic()
        connection = self._take(deadline)
        try:
            if connection is not None:
                try:
                    return exchange(connection)
                except ConnectionError:
                    connection.close()
            connection = self._connect(deadline)
            return exchange(connection)
        except ErrorReplyError as reply:
            raise type(reply.error)(f"{self.address}: {reply.error}") from None
        except TimeoutError as error:
            raise StoreUnavailable(f"{self.address}: no answer within {deadline - began:.3f} s") from error
        except OSError as error:
            raise StoreUnavailable(f"{self.address} cannot be reached: {error.strerror or error}") from error
        finally:
            self._give_back(connection)

    def _take(self, deadline: float) -> Connection | None:
        if self._closed:
            raise StoreUnavailable(f"{self.address}: this client was closed")
        wait = max(0.0, deadline - time.monotonic())
        try:
            return self._idle.get(timeout=wait)
        except queue.Empty:
            message = f"{self.address}: all {self._connections} connections were busy for {wait:.3f} s"
            raise StoreUnavailable(message) from None

    def _give_back(self, connection: Connection | None) -> None:
        if connection is not None and (self._closed or not connection.usable):
            connection.close()
            connection = None
        self._idle.put(connection)

    def _connect(self, deadline: float) -> Connection:
        connection = Connection(self._address, deadline)
        if self._password is not None:
            try:
                connection.exchange([resp.command(b"AUTH", self._password.encode())], deadline)
            except BaseException:
                connection.close()
                raise
        return connection
