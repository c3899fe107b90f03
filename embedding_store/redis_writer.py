"""Publishing into a Redis, by redis-py."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from typing import TYPE_CHECKING, cast

import msgspec

from embedding_store import redis_scripts as scripts
from embedding_store.backend import ReleaseWriter, Verified, conflict, namespace
from embedding_store.errors import ReleaseConflict, StoreUnavailable
from embedding_store.redis_keys import Record, decode_record
from embedding_store.redis_pages import RedisPages
from embedding_store.release import ReleaseManifest, TableInfo

if TYPE_CHECKING:
    from embedding_store.redis_backend import RedisBackend

_LEASE_MS = 30_000
_RENEWED_AFTER = 5.0  # seconds


class RedisWriter(RedisPages, ReleaseWriter):
    """Holds a lease on the publication while it is used: a key that expires when nobody renews it."""

    def __init__(self, backend: RedisBackend, manifest: ReleaseManifest) -> None:
        self._backend = backend
        self._manifest = manifest
        self._content = namespace(manifest)
        self._token = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._encoded = self._begin()
        super().__init__(backend, decode_record(backend.address, manifest.name, self._encoded).namespace)
        self._renewed = time.monotonic()

    def _begin(self) -> bytes:
        """Takes the lease; returns the record of the publication, which an earlier run may have made."""
        fresh = secrets.token_hex(8)
        records = [msgspec.json.encode(Record(name, self._manifest)) for name in (self._content, fresh)]
        keys = ("writing", f"{self._content}:lease", "removed", "since", "releases")
        arguments: tuple[str | bytes | int, ...] = (
            self._content, self._token, _LEASE_MS, *records, self._manifest.name
        )  # fmt: skip
        with self._backend.errors():
            answer = cast(list[bytes], self._backend.run(scripts.BEGIN, keys, *arguments, ""))
            if len(answer) > 1 and _is_dead(answer[0].decode()):
                answer = cast(list[bytes], self._backend.run(scripts.BEGIN, keys, *arguments, answer[0]))
        if not answer:
            self._backend.contains(self._manifest)  # raises where it has other content
            raise ReleaseConflict(
                f"{self._backend.address}: another publisher has finished {self._manifest.name} meanwhile"
            )
        if len(answer) > 1:
            host, process, _ = answer[0].decode().rsplit(":", 2)
            raise ReleaseConflict(
                f"{self._backend.address}: another publisher, process {process} on {host}, is writing "
                f"{self._manifest.name} at this moment (if it is dead: its lease ends in {int(answer[1]) / 1000:.0f} s)"
            )
        return answer[0]

    def mark_verified(self, table: TableInfo, verified: Verified) -> None:
        key = self._backend.key(self._namespace, "verified")
        with self._backend.errors():
            self._backend.control.hset(key, table.name, cast(str, msgspec.json.encode(verified)))

    def verified(self) -> dict[str, Verified]:
        key = self._backend.key(self._namespace, "verified")
        with self._backend.errors():
            found = cast(dict[bytes, bytes], self._backend.control.hgetall(key))
        return {name.decode(): msgspec.json.decode(value, type=Verified) for name, value in found.items()}

    def renew(self) -> None:
        if time.monotonic() - self._renewed < _RENEWED_AFTER:
            return
        keys = ("writing", f"{self._content}:lease", "since")
        self._run(scripts.RENEW, keys, self._content, self._token, _LEASE_MS, self._encoded)
        self._renewed = time.monotonic()

    def commit(self) -> None:
        verified = f"{self._namespace}:verified"
        keys = ("writing", f"{self._content}:lease", "since", "releases", "removed", verified)
        self._run(scripts.COMMIT, keys, self._content, self._token, self._manifest.name, self._encoded)

    def _run(self, script: str, keys: tuple[str, ...], *arguments: str | bytes | int) -> None:
        with self._backend.errors():
            refused = cast(bytes, self._backend.run(script, keys, *arguments)).decode()
        if not refused or (refused == "conflict" and self._backend.contains(self._manifest)):
            return
        if refused == "conflict":
            raise conflict(self._backend.address, self._manifest.name)
        publication = f"{self._backend.address}: this publication of {self._manifest.name} "
        if refused == "removed":
            raise ReleaseConflict(f"{publication}was finished or removed by others meanwhile; publish it again")
        host, process, _ = refused.rsplit(":", 2)
        raise ReleaseConflict(f"{publication}was paused, and process {process} on {host} has taken it over")

    def close(self) -> None:
        """Ends the lease, so that others need not wait for it. Connections belong to the backend."""
        with contextlib.suppress(StoreUnavailable), self._backend.errors():
            self._backend.run(scripts.END, (f"{self._content}:lease",), self._token)


def _is_dead(token: str) -> bool:
    """Whether the holder of a lease was a process of this host that is gone. Where another host, or a container, has
    the same name, its publisher loses the lease and is told so."""
    host, process, _ = token.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, and alive
    return False
