"""Where a Redis is and how to speak to it, out of a store URL.

    redis://[USER[:PASSWORD]@]HOST[:PORT][/DB][?OPTION=VALUE&…]     rediss:// the same over TLS
    redis+unix://[USER[:PASSWORD]@]/path/to/socket[?…]

    db             database number, for redis+unix:// (the others have it in the path); default 0
    prefix         first part of every key, default `torchrank`: several stores may share a server
    timeout        seconds for connecting and for every answer, default 5; a look-up may ask for less
    password_file  a file that holds the password
    ca_file        certificates to trust instead of the system's, for rediss://

A password is better kept out of the URL, in `password_file` or in the environment variable TORCHRANK_REDIS_PASSWORD.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from embedding_store.codec import check_name
from embedding_store.errors import InvalidRelease, InvalidStoreURL

PASSWORD_VARIABLE = "TORCHRANK_REDIS_PASSWORD"
_ESCAPE = "a password with / : @ # ? in it must be escaped (%2F %3A %40 %23 %3F)"
_OPTIONS = ("db", "prefix", "timeout", "password_file", "ca_file")


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Either host and port, or socket."""

    host: str = "localhost"
    port: int = 6379
    socket: str | None = None
    tls: bool = False
    ca_file: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    prefix: str = "torchrank"
    timeout: float = 5.0

    def __str__(self) -> str:
        """For messages and logs: without the credentials."""
        if self.socket is not None:
            return f"redis+unix://{self.socket}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"


def parse_redis_url(url: str) -> RedisAddress:
    """Raises InvalidStoreURL, whose message does not repeat the URL: it may hold a password."""
    parts = urlsplit(url)
    if (
        parts.fragment or "@" in parts.path + parts.query
    ):  # the rest of a password; messages below may quote these parts
        raise InvalidStoreURL(f"the store URL has a # or a second @; {_ESCAPE}")
    options = _options(parts)
    unix = parts.scheme == "redis+unix"
    if unix and (parts.hostname or not parts.path.startswith("/") or parts.path == "/"):
        raise InvalidStoreURL("redis+unix:// needs an absolute path: redis+unix:///path/to/socket")
    if not unix and not parts.hostname:
        raise InvalidStoreURL(f"{parts.scheme}:// names no host; accepted: {parts.scheme}://HOST[:PORT][/DB]")
    path_db = "" if unix else parts.path.strip("/")
    if path_db and "db" in options:
        raise InvalidStoreURL("the store URL gives the database twice, in the path and as db")
    return RedisAddress(
        host=parts.hostname or "localhost",
        port=_port(parts),
        socket=unquote(parts.path) if unix else None,
        tls=parts.scheme == "rediss",
        ca_file=_ca_file(options.get("ca_file")),
        username=unquote(parts.username) if parts.username else None,
        password=_password(parts, options.get("password_file")),
        db=_database(path_db or options.get("db", "0")),
        prefix=_prefix(options.get("prefix", "torchrank")),
        timeout=_timeout(options.get("timeout", "5")),
    )


def _options(parts: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise InvalidStoreURL(f"the store URL has an option {name!r}; accepted: {', '.join(_OPTIONS)}")
    return options


def _port(parts: SplitResult) -> int:
    try:
        return parts.port or 6379
    except ValueError:  # not chained: urllib's message quotes what stands there, which may be half a password
        raise InvalidStoreURL(f"the store URL's port is not a number from 1 to 65535; {_ESCAPE}") from None


def _database(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise InvalidStoreURL(f"the store URL's database is {text!r}; accepted: a number")
    return int(text)


def _prefix(text: str) -> str:
    try:
        return check_name("prefix", text)
    except InvalidRelease as error:
        raise InvalidStoreURL(str(error)) from error


def _timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidStoreURL(f"the store URL's timeout is {text!r}; accepted: seconds, more than 0")
    return seconds


def _ca_file(path: str | None) -> str | None:
    if path is not None and not Path(path).is_file():
        raise InvalidStoreURL(f"ca_file {path}: there is no such file")
    return path


def _password(parts: SplitResult, password_file: str | None) -> str | None:
    if parts.password:
        return unquote(parts.password)
    if password_file is not None:
        try:
            return Path(password_file).read_text().strip()
        except OSError as error:
            raise InvalidStoreURL(f"password_file {password_file}: {error.strerror}") from error
    return os.environ.get(PASSWORD_VARIABLE) or None
