"""A relay before a server, for tests: it cuts a connection in the middle of a reply, lets replies through slowly, or
changes them."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class TcpProxy:
    """127.0.0.1:`port` is relayed to `target`. `cut_after`: bytes of replies, over all connections, after which the
    connection is reset; None: never. `bytes_per_second` of replies; None: as fast as they come. `changed`: bytes in
    replies that others of the same length are put for, as often as they come in one piece; `changes` counts them."""

    def __init__(self, target: int) -> None:
        self.cut_after: int | None = None
        self.bytes_per_second: float | None = None
        self.changed: dict[bytes, bytes] = {}
        self.changes = 0
        self.cuts = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._sockets:
            _shut(one)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += [client, server]
            for pump, source, sink in ((self._requests, client, server), (self._replies, server, client)):
                self._threads.append(threading.Thread(target=pump, args=(source, sink), daemon=True))
                self._threads[-1].start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(1 << 16):
                server.sendall(data)
        except OSError:
            pass
        _shut(server)

    def _replies(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(1 << 16 if self.bytes_per_second is None else 100):
                if self.bytes_per_second is not None:
                    time.sleep(len(data) / self.bytes_per_second)
                for found, other in self.changed.items():
                    self.changes += data.count(found)
                    data = data.replace(found, other)
                if self.cut_after is not None:
                    data, self.cut_after = data[: self.cut_after], self.cut_after - len(data)
                    if self.cut_after <= 0:
                        client.sendall(data)
                        self.cut_after = None
                        self.cuts += 1
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                        client.shutdown(socket.SHUT_RD)  # wakes the other thread, or closing would wait for it
                        client.close()
                        return
                client.sendall(data)
        except OSError:
            pass
        _shut(client)


def _shut(one: socket.socket) -> None:
    with suppress(OSError):  # it is not connected any more
        one.shutdown(socket.SHUT_RDWR)
