"""TLS between a sidecar and its clients: one context per side, whose errors name the file that is wrong."""

from __future__ import annotations

import ssl
from pathlib import Path

HANDSHAKE_SECONDS = 5.0  # a peer that has not greeted by then is dropped
SHUTDOWN_SECONDS = 1.0  # nor is one waited for that does not say good-bye


def server_context(certificate: Path, key: Path, ca: Path | None = None) -> ssl.SSLContext:
    """TLS 1.2 or later. certificate: PEM, the host's own first, then those that signed it. ca: PEM; clients must then
    present a certificate that one of these signed. Raises OSError and ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _identify(context, certificate, key)
    if ca is not None:
        _trust(context, ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class ServerTls:
    """TLS of a listener whose files may be replaced while it runs. context: of what was read last; another one after a
    change, so that no session that began under the authorities before goes on. Raises as `server_context`."""

    def __init__(self, certificate: Path, key: Path, ca: Path | None = None) -> None:
        self._files = tuple(file for file in (certificate, key, ca) if file is not None)
        self._seen = self._versions()  # before they are read: a change meanwhile is a change
        self.context = server_context(*self._files)

    def reload(self) -> bool:
        """Reads the files where they have changed since they were last read; whether they had. Raises as
        `server_context`: then the context stays, and they are read again by the next call."""
        versions = self._versions()
        if versions == self._seen:
            return False
        self.context = server_context(*self._files)
        self._seen = versions
        return True

    def _versions(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_version, self._files))


def _version(file: Path) -> tuple[int, ...] | None:
    """Of what a path leads to at the moment, and who may read it; None where that is nothing."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def client_context(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """Trusts `ca` instead of the system's certificates, where given; the host's name or address is always checked.
    Raises as `server_context`."""
    context = ssl.create_default_context() if ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is not None:
        _trust(context, ca)
    if certificate is not None:
        _identify(context, certificate, key or certificate)
    return context


def _identify(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    for file in (certificate, key):
        file.open().close()  # OpenSSL's own error does not say which of the two it could not read
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{certificate} and {key} are no PEM certificate and its unencrypted key: {error}") from error


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    ca.open().close()
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ValueError(f"{ca} holds no PEM certificate: {error}") from error


def _no_password() -> str:
    """OpenSSL would ask at the terminal, where a service has none."""
    raise ValueError("the key is encrypted")
