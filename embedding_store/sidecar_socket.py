"""The sockets a sidecar listens on. A socket file is taken over only from a process that is gone."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from pathlib import Path

from embedding_store.errors import StoreUnavailable

BACKLOG = 512
_LONGEST_PATH = 107  # sockaddr_un of Linux, without its closing zero


def refuse_taken(path: Path) -> None:
    """Raises StoreUnavailable where another process answers on `path`, or where a file is no socket."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StoreUnavailable(f"{path} exists and is not a socket; it is left as it is")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except (TimeoutError, BlockingIOError):
            pass  # somebody listens and is slow to accept
    raise StoreUnavailable(f"{path}: another process answers there; stop it first or choose another --socket")


class UnixListener:
    """A listening unix socket and its file, which `remove` deletes as long as it is this socket's own."""

    def __init__(self, path: Path, mode: int) -> None:
        if len(os.fsencode(path)) > _LONGEST_PATH:
            raise StoreUnavailable(
                f"{path} is {len(os.fsencode(path))} bytes long; a socket's path has {_LONGEST_PATH} at most"
            )
        refuse_taken(path)
        path.unlink(missing_ok=True)
        self._path = path
        self.socket = socket.socket(socket.AF_UNIX)
        before = os.umask(0o777 & ~mode)  # a chmod after bind would leave a moment with other rights
        try:
            self.socket.bind(os.fspath(path))
        except OSError as error:
            self.socket.close()
            raise StoreUnavailable(f"cannot listen on {path}: {error.strerror}") from error
        finally:
            os.umask(before)
        self.socket.listen(BACKLOG)
        self.socket.setblocking(False)
        self._file: os.stat_result | None = path.stat()

    @property
    def address(self) -> str:
        return f"unix://{self._path.absolute()}"

    def remove(self) -> None:
        """Once; before the socket closes, since after that another file may get this one's inode."""
        mine, self._file = self._file, None
        try:
            if mine is not None and os.path.samestat(self._path.stat(), mine):
                self._path.unlink()
        except FileNotFoundError:
            return  # somebody deleted it: nothing of ours is left


def parse_listen(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPv6]:PORT`. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(
            f"cannot listen on {text!r}: expected HOST:PORT with a port of 0 to 65535, as in 127.0.0.1:7070"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen_tcp(host: str, port: int) -> socket.socket:
    """Port 0 takes a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        hint = ": another process listens there" if error.errno == errno.EADDRINUSE else f": {error.strerror}"
        raise StoreUnavailable(f"cannot listen on {host}:{port}{hint}") from error
    listener.setblocking(False)
    return listener


def tcp_address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
