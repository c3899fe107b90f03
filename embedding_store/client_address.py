"""Where a sidecar listens, and how to speak to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from embedding_store.errors import InvalidStoreURL

if TYPE_CHECKING:
    import ssl

_ACCEPTED = "accepted: unix:///PATH, tcp://HOST:PORT, tls://HOST:PORT[?OPTION=FILE&…] or a path"
_TLS_OPTIONS = ("ca_file", "cert_file", "key_file")


@dataclass(frozen=True, slots=True)
class Address:
    """A path, or host and port, with a context where TLS is spoken. text: for messages."""

    text: str
    path: str = ""
    host: str = ""
    port: int = 0
    tls: ssl.SSLContext | None = field(default=None, compare=False)


def parse_address(text: str) -> Address:
    """`unix:///path`, a path, `tcp://host:port` or `tls://host:port`, the last with options:

    ca_file    certificates to trust instead of the system's
    cert_file  the client's own certificate, where the sidecar asks for one; key_file: its key, where it is not in there

    Raises InvalidStoreURL; ValueError and OSError for what is wrong with the files.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme == "unix":
        path = rest if separator else text
        if path:
            return Address(f"unix://{Path(path).absolute()}", path=path)
    elif scheme in ("tcp", "tls"):
        place, _, options = rest.partition("?")
        host, _, port = place.rpartition(":")
        if host and port.isdecimal() and 0 < int(port) < 65536 and (scheme == "tls" or not options):
            tls = _context(options) if scheme == "tls" else None
            host = host.removeprefix("[").removesuffix("]")
            return Address(f"{scheme}://{place}", host=host, port=int(port), tls=tls)
    raise InvalidStoreURL(f"sidecar address {text!r}; {_ACCEPTED}")


def _context(options: str) -> ssl.SSLContext:
    from embedding_store.sidecar_tls import client_context

    files = {name: Path(file) for name, file in parse_qsl(options, keep_blank_values=True)}
    for name in files:
        if name not in _TLS_OPTIONS:
            raise InvalidStoreURL(f"sidecar address has the option {name!r}; accepted: {', '.join(_TLS_OPTIONS)}")
    if "key_file" in files and "cert_file" not in files:
        raise InvalidStoreURL("sidecar address has a key_file without its cert_file")
    return client_context(files.get("ca_file"), files.get("cert_file"), files.get("key_file"))
