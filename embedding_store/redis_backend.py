"""Releases in a Redis; the keys are in `redis_keys.py`."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import msgspec
import numpy as np
import redis
from numpy.typing import NDArray

from embedding_store.backend import (
    Backend,
    History,
    NodeStats,
    ReleaseWriter,
    Stored,
    check_current,
    conflict,
    hot_list,
    moved,
    namespace,
)
from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.codec import check_name
from embedding_store.errors import UnknownRelease
from embedding_store.page_store import PageStore
from embedding_store.redis_cluster import ClusterReader
from embedding_store.redis_control import connect, errors
from embedding_store.redis_gc import RedisShelf
from embedding_store.redis_keys import Record, control_key, decode_record, page_key
from embedding_store.redis_pages import RedisPages
from embedding_store.redis_preflight import check_server
from embedding_store.redis_read import RedisReader
from embedding_store.redis_scripts import SET_HISTORY
from embedding_store.redis_url import RedisAddress
from embedding_store.redis_writer import RedisWriter
from embedding_store.release import ReleaseManifest


class RedisBackend(Backend):
    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._records: dict[str, Record] = {}
        self._reader = ClusterReader(address) if address.cluster else RedisReader(address)
        self._control: redis.Redis | None = None
        self._shelf = RedisShelf(self)
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return str(self._address)

    @property
    def control(self) -> redis.Redis:
        """Made when first asked for, inside `errors`: a cluster's client connects at once."""
        with self._lock:
            if self._control is None:
                self._control = connect(self._address)
            return self._control

    def key(self, *parts: object) -> str:
        return control_key(self.prefix, *parts)

    @property
    def prefix(self) -> str:
        return self._address.prefix

    @property
    def cluster(self) -> bool:
        return bool(self._address.cluster)

    def run(self, script: str, keys: tuple[str, ...], *arguments: str | bytes | int) -> object:
        """Of `redis_scripts.py`, inside `errors`. keys: without prefix and braces, as "active" or "CONTENT:lease"."""
        names = [self.key(key) for key in keys]
        return self.control.eval(script, len(names), *names, *cast(tuple[str, ...], arguments))

    def releases(self) -> dict[str, ReleaseManifest]:
        with self.errors():
            found = cast(dict[bytes, bytes], self.control.hgetall(self.key("releases")))
        records = {name.decode(): self._decode(name.decode(), value) for name, value in sorted(found.items())}
        self._records |= records  # one that was removed and published again has another namespace
        return {name: record.manifest for name, record in records.items()}

    def inventory(self) -> list[Stored]:
        return self._shelf.inventory()

    def manifest(self, release: str, *, timeout: float | None = None) -> ReleaseManifest:
        return self._record(release, timeout).manifest

    def contains(self, manifest: ReleaseManifest) -> bool:
        with self.errors():
            complete = cast(bytes | None, self.control.hget(self.key("releases"), manifest.name))
            removed = cast(bytes | None, self.control.hget(self.key("removed"), manifest.name))
        content = namespace(manifest)
        if complete is not None:
            if namespace(self._decode(manifest.name, complete).manifest) != content:
                raise conflict(self.address, manifest.name)
        elif removed is not None and removed.decode() != content:
            raise conflict(self.address, manifest.name, removed=True)
        return complete is not None

    def histories(self) -> dict[str, History]:
        with self.errors():
            found = cast(dict[bytes, bytes], self.control.hgetall(self.key("active")))
        return {model.decode(): _history(value) for model, value in sorted(found.items())}

    def history(self, model: str) -> History:
        with self.errors():
            return _history(cast(bytes | None, self.control.hget(self.key("active"), model)))

    def set_history(self, model: str, expected: History, history: History) -> None:
        check_name("model", model)
        arguments = (msgspec.json.encode(expected), msgspec.json.encode(history), history[-1] if history else "")
        with self.errors():
            refused = cast(bytes, self.run(SET_HISTORY, ("active", "releases", "since"), model, *arguments))
        if refused == b"unknown":
            raise self._unknown(history[-1])
        if refused:
            raise moved(self.address, model, expected, _history(refused))

    def fetch(self, release: str, batch: IdBatch, *, timeout: float | None = None) -> FetchedRows:
        began = time.monotonic()
        record = self._record(release, timeout)
        left = None if timeout is None else timeout - (time.monotonic() - began)
        return self._reader.fetch(record, batch, timeout=left)

    def nodes(self) -> Sequence[NodeStats]:
        return self._reader.nodes()

    def hot_ids(self, release: str, table: str) -> NDArray[np.int64]:
        record = self._record(release)
        info = record.manifest.table(table)
        if not info.hot_ids:
            return np.empty(0, np.int64)
        with self.errors():
            content = cast(bytes | None, self.control.get(page_key(self.prefix, record.namespace, table, "hot")))
        return hot_list(self.address, release, info, content)

    def preflight(self, manifest: ReleaseManifest, *, room: int | None = None) -> None:
        check_server(self, manifest, room)

    def writer(self, manifest: ReleaseManifest) -> ReleaseWriter:
        self.contains(manifest)
        return RedisWriter(self, manifest)

    def pages(self, release: str) -> PageStore:
        self._records.pop(release, None)  # it may have been removed and published again since
        return RedisPages(self, self._record(release).namespace)

    def pin(self, owner: str, releases: Collection[str], seconds: float) -> frozenset[str]:
        return self._shelf.pin(check_name("owner", owner), releases, seconds)

    def pins(self) -> dict[str, list[str]]:
        return self._shelf.pins()

    def take_out(self, stored: Stored) -> None:
        self._records.pop(stored.release, None)
        self._shelf.take_out(stored)

    def erase(self, stored: Stored) -> Iterator[int]:
        return self._shelf.erase(stored)

    def forget(self, release: str) -> None:
        self._records.pop(release, None)

    def close(self) -> None:
        self._reader.close()
        if self._control is not None:
            self._control.close()

    def _record(self, release: str, timeout: float | None = None) -> Record:
        known = self._records.get(release)
        if known is None:
            began = time.monotonic()
            value = cast(bytes | None, self._read("HGET", "releases", release, timeout=timeout))
            if value is None:
                raise self._unknown(release, None if timeout is None else timeout - (time.monotonic() - began))
            known = self._records[release] = self._decode(release, value)
        check_current(self.address, known.manifest)
        return known

    def _unknown(self, release: str, timeout: float | None = None) -> UnknownRelease:
        names = cast(list[bytes], self._read("HKEYS", "releases", timeout=timeout))
        having = ", ".join(sorted(name.decode() for name in names)) or "none"
        return UnknownRelease(f"no release {release!r} in {self.address}; it has: {having}")

    def _read(self, command: str, key: str, *arguments: str, timeout: float | None) -> object:
        """Within `timeout` seconds over the connections that rows are read by, else in the store's own time over the
        one that releases are managed by. Raises StoreUnavailable."""
        if timeout is not None:
            return self._reader.request((command, self.key(key), *arguments), timeout=timeout)
        with self.errors():
            control: Any = self.control
            return control.execute_command(command, self.key(key), *arguments)

    def _decode(self, release: str, value: bytes) -> Record:
        return decode_record(self.address, release, value)

    def errors(self) -> AbstractContextManager[None]:
        return errors(self._address)


def _history(value: bytes | None) -> History:
    return () if value is None else msgspec.json.decode(value, type=History)
