"""Where a Redis is and how to speak to it, out of a store URL.

    redis://[USER[:PASSWORD]@]HOST[:PORT][/DB][?OPTION=VALUE&…]     rediss:// the same over TLS
    redis+unix://[USER[:PASSWORD]@]/path/to/socket[?…]
    redis+cluster://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]…][?…]    rediss+cluster:// the same over TLS

The hosts of a cluster are those that are asked for all the others; one suffices, several survive its failure.

    db               database number, for redis+unix:// (redis:// has it in the path, a cluster has none); default 0
    prefix           first part of every key, default `torchrank`: several stores may share a server
    timeout          seconds for a whole answer, default 5; a look-up may ask for less
    connect_timeout  seconds for a new connection, TLS and credentials included, default 2; never more than `timeout`
    connections      connections to a node at most, default 16; a look-up that finds all of them busy waits
    replicas         yes: a cluster's rows are read from replicas, and from masters where those fail; default no
    password_file    a file that holds the password
    ca_file          with TLS: certificates to trust instead of the system's
    cert_file        with TLS: this client's certificate, where servers ask for one
    key_file         with TLS: the key of cert_file, where that file does not hold it too

A password is better kept out of the URL, in `password_file` or in the environment variable TORCHRANK_REDIS_PASSWORD.
A server's certificate must name the host of the URL, in a cluster the hosts that CLUSTER SLOTS names.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from embedding_store.codec import check_name
from embedding_store.errors import InvalidRelease, InvalidStoreURL

PASSWORD_VARIABLE = "TORCHRANK_REDIS_PASSWORD"
_ESCAPE = "a password with / : @ # ? [ ] in it must be escaped (%2F %3A %40 %23 %3F %5B %5D)"
_OPTIONS = (
    "db", "prefix", "timeout", "connect_timeout", "connections", "replicas", "password_file", "ca_file", "cert_file",
    "key_file",
)  # fmt: skip
_TLS_OPTIONS = ("ca_file", "cert_file", "key_file")
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:(?P<port>.*))?")

Host = tuple[str, int]  # and port


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """One server, by host and port or by socket; or the nodes of `cluster` that are asked for the others."""

    host: str = "localhost"
    port: int = 6379
    socket: str | None = None
    cluster: tuple[Host, ...] = ()
    in_cluster: bool = False  # it is a cluster, or a node of one
    replicas: bool = False
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    prefix: str = "torchrank"
    timeout: float = 5.0
    connect_timeout: float = 2.0
    connections: int = 16

    def __str__(self) -> str:
        """For messages and logs: without the credentials."""
        if self.socket is not None:
            return f"redis+unix://{self.socket}?db={self.db}"
        scheme = "rediss" if self.tls else "redis"
        if self.cluster:
            return f"{scheme}+cluster://{','.join(map(_host_text, self.cluster))}"
        return f"{scheme}://{_host_text((self.host, self.port))}/{self.db}"

    def node(self, host: Host) -> RedisAddress:
        """A node of the cluster, with the same credentials and options."""
        return replace(self, host=host[0], port=host[1], cluster=())


def parse_redis_url(url: str) -> RedisAddress:
    """Raises InvalidStoreURL, whose message does not repeat the URL: it may hold a password."""
    parts = _split(url)
    if (
        parts.fragment or "@" in parts.path + parts.query
    ):  # the rest of a password; messages below may quote these parts
        raise InvalidStoreURL(f"the store URL has a # or a second @; {_ESCAPE}")
    tls, cluster = parts.scheme.startswith("rediss"), parts.scheme.endswith("+cluster")
    options = _options(parts)
    _check_options(parts.scheme, options, tls, cluster)
    user, password, hosts, socket = _place(parts, cluster)
    return RedisAddress(
        host=hosts[0][0],
        port=hosts[0][1],
        socket=socket,
        cluster=hosts if cluster else (),
        in_cluster=cluster,
        replicas=_yes_or_no("replicas", options.get("replicas", "no")),
        tls=tls,
        ca_file=_file("ca_file", options),
        cert_file=_file("cert_file", options),
        key_file=_file("key_file", options),
        username=user,
        password=_password(password, options.get("password_file")),
        db=_database(parts, cluster, options.get("db")),
        prefix=_prefix(options.get("prefix", "torchrank")),
        timeout=_seconds("timeout", options.get("timeout", "5")),
        connect_timeout=_seconds("connect_timeout", options.get("connect_timeout", "2")),
        connections=_connections(options.get("connections", "16")),
    )


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # whose message may repeat all of it
        raise InvalidStoreURL(f"the store URL has brackets or letters that no host has; {_ESCAPE}") from None


def _options(parts: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise InvalidStoreURL(f"the store URL has an option {name!r}; accepted: {', '.join(_OPTIONS)}")
    return options


def _check_options(scheme: str, options: dict[str, str], tls: bool, cluster: bool) -> None:
    for name in _TLS_OPTIONS:
        if name in options and not tls:
            raise InvalidStoreURL(f"{name} is for rediss:// and rediss+cluster://; {scheme}:// does not use TLS")
    if "key_file" in options and "cert_file" not in options:
        raise InvalidStoreURL("key_file is the key of cert_file, which the store URL does not give")
    if "replicas" in options and not cluster:
        raise InvalidStoreURL(f"replicas is for redis+cluster:// and rediss+cluster://; this is {scheme}://")


def _place(parts: SplitResult, cluster: bool) -> tuple[str | None, str | None, tuple[Host, ...], str | None]:
    """User, password, hosts, socket."""
    credentials, _, where = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    socket = None
    if parts.scheme == "redis+unix":
        if where or not parts.path.startswith("/") or parts.path == "/":
            raise InvalidStoreURL("redis+unix:// needs an absolute path: redis+unix:///path/to/socket")
        socket, where = unquote(parts.path), "localhost"
    elif not where:
        accepted = "HOST[:PORT][,HOST[:PORT]…]" if cluster else "HOST[:PORT][/DB]"
        raise InvalidStoreURL(f"{parts.scheme}:// names no host; accepted: {parts.scheme}://{accepted}")
    hosts = tuple(_host(text) for text in (where.split(",") if cluster else [where]))
    return unquote(user) or None, unquote(password) or None, hosts, socket


def _host(text: str) -> Host:
    """Raises without repeating the text: it may be half of a password."""
    found = _HOST.fullmatch(text)
    if found is None:
        raise InvalidStoreURL(f"the store URL's host is not HOST[:PORT], with [ ] around an IPv6 address; {_ESCAPE}")
    port = found["port"] or "6379"
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidStoreURL(f"the store URL's port is not a number from 1 to 65535; {_ESCAPE}")
    return found["host"].strip("[]").lower(), int(port)


def _host_text(host: Host) -> str:
    name, port = host
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _database(parts: SplitResult, cluster: bool, option: str | None) -> int:
    path = "" if parts.scheme == "redis+unix" else parts.path.strip("/")
    if path and option is not None:
        raise InvalidStoreURL("the store URL gives the database twice, in the path and as db")
    text = path or option or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidStoreURL(f"the store URL's database is {text!r}; accepted: a number")
    if cluster and int(text):
        raise InvalidStoreURL(f"the store URL's database is {text!r}; a cluster has only database 0")
    return int(text)


def _prefix(text: str) -> str:
    try:
        return check_name("prefix", text)
    except InvalidRelease as error:
        raise InvalidStoreURL(str(error)) from error


def _seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidStoreURL(f"the store URL's {name} is {text!r}; accepted: seconds, more than 0")
    return seconds


def _connections(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1000):
        raise InvalidStoreURL(f"the store URL's connections is {text!r}; accepted: a number from 1 to 1000")
    return int(text)


def _yes_or_no(name: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise InvalidStoreURL(f"the store URL's {name} is {text!r}; accepted: yes, no")
    return text == "yes"


def _file(name: str, options: dict[str, str]) -> str | None:
    path = options.get(name)
    if path is not None and not Path(path).is_file():
        raise InvalidStoreURL(f"{name} {path}: there is no such file")
    return path


def _password(in_url: str | None, password_file: str | None) -> str | None:
    if in_url:
        return in_url
    if password_file is not None:
        try:
            return Path(password_file).read_text().strip()
        except OSError as error:
            raise InvalidStoreURL(f"password_file {password_file}: {error.strerror}") from error
    return os.environ.get(PASSWORD_VARIABLE) or None
