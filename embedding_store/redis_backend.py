"""Releases in a Redis. Keys, after the prefix of the URL (default `torchrank`):

    PREFIX:releases                 hash: release -> its namespace and manifest; a field appears when all pages stand
    PREFIX:writing                  hash: namespace -> namespace and manifest, of publications that have not committed
    PREFIX:active                   hash: model -> history of activations
    PREFIX:NAMESPACE:TABLE:PAGE     string: one page of rows
    PREFIX:NAMESPACE:TABLE:hot      string: the hot list
    PREFIX:NAMESPACE:verified       set: tables that a publication under way has finished

No command here looks at keys that are not ours, or at all keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import msgspec
import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.retry import Retry

from embedding_store.backend import Backend, Fetched, History, ReleaseWriter, Unfinished, conflict, moved, namespace
from embedding_store.codec import check_name
from embedding_store.errors import InvalidRelease, StoreError, StoreUnavailable, UnknownRelease
from embedding_store.redis_url import RedisAddress
from embedding_store.redis_wire import Batch, RedisWire, encode_getrange
from embedding_store.release import ReleaseManifest, TableInfo

_MOST_COMMANDS = 16384  # in one pipeline: bounds the buffers on both sides

# Also succeeds where the pointer is there already: the answer to the first try may have been lost.
_SET_HISTORY = """
local current = redis.call('HGET', KEYS[1], ARGV[1]) or '[]'
if current ~= ARGV[2] and current ~= ARGV[3] then return current end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return ARGV[3]
"""

_COMMIT = """
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 and redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[2], ARGV[3])
redis.call('DEL', KEYS[3])
return 1
"""


class _Record(msgspec.Struct, frozen=True):
    namespace: str
    manifest: ReleaseManifest


class RedisBackend(Backend):
    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._records: dict[str, _Record] = {}
        self._wire = RedisWire(address)
        self.control = _control(address)

    @property
    def address(self) -> str:
        return str(self._address)

    def key(self, *parts: object) -> str:
        return ":".join((self._address.prefix, *map(str, parts)))

    def releases(self) -> dict[str, ReleaseManifest]:
        with self.errors():
            found = cast(dict[bytes, bytes], self.control.hgetall(self.key("releases")))
        return {name.decode(): self._decode(name.decode(), value).manifest for name, value in sorted(found.items())}

    def unfinished(self) -> list[Unfinished]:
        with self.errors():
            found = cast(dict[bytes, bytes], self.control.hgetall(self.key("writing")))
        records = [self._decode(content.decode(), value) for content, value in sorted(found.items())]
        return [Unfinished(record.manifest.name, record.namespace) for record in records]

    def manifest(self, release: str) -> ReleaseManifest:
        return self._record(release).manifest

    def contains(self, manifest: ReleaseManifest) -> bool:
        with self.errors():
            complete = cast(bytes | None, self.control.hget(self.key("releases"), manifest.name))
        if complete is None:
            return False
        if self._decode(manifest.name, complete).namespace != namespace(manifest):
            raise conflict(self.address, manifest.name)
        return True

    def histories(self) -> dict[str, History]:
        with self.errors():
            found = cast(dict[bytes, bytes], self.control.hgetall(self.key("active")))
        return {model.decode(): _history(value) for model, value in sorted(found.items())}

    def history(self, model: str) -> History:
        with self.errors():
            return _history(cast(bytes | None, self.control.hget(self.key("active"), model)))

    def set_history(self, model: str, expected: History, history: History) -> None:
        check_name("model", model)
        wanted = msgspec.json.encode(history)
        with self.errors():
            current = cast(
                bytes,
                self.control.eval(
                    _SET_HISTORY,
                    1,
                    self.key("active"),
                    model,
                    cast(str, msgspec.json.encode(expected)),
                    cast(str, wanted),
                ),
            )
        if current != wanted:
            raise moved(self.address, model, expected, _history(current))

    def fetch(self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None) -> Fetched:
        record = self._record(release)
        fetched: Fetched = {}
        batches = Batches()
        for name, wanted in ids.items():
            table = record.manifest.table(name)
            found = (wanted >= 0) & (wanted < table.rows)
            fetched[name] = np.zeros((len(wanted), table.row_bytes), np.uint8), found
            prefix = self.key(record.namespace, name, "").encode()
            batches.add(prefix, wanted if found.all() else wanted[found], table)
        replies = self._wire.call(batches.batches, timeout)

        first = 0
        for name, (rows, found) in fetched.items():
            last = first + int(np.count_nonzero(found))
            present = self._rows(replies[first:last], record, name, ids[name][found])
            fetched[name] = (present if last - first == len(found) else _scatter(present, rows, found)), found
            first = last
        return fetched

    def _rows(self, replies: list[bytes], record: _Record, table: str, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, row_bytes]. A page that is gone reads as "", which must not pass for an absent id."""
        info = record.manifest.table(table)
        joined = np.frombuffer(bytearray().join(replies), np.uint8)  # writable: one type for the kernels
        if joined.size == len(replies) * info.row_bytes:
            return joined.reshape(-1, info.row_bytes)
        damaged = next(i for i, reply in enumerate(replies) if len(reply) != info.row_bytes)
        page = int(ids[damaged]) // info.page_rows
        raise StoreUnavailable(
            f"{self.address} has lost page {page} of table {table!r} of {record.manifest.name} (evicted or deleted? "
            "maxmemory-policy must be noeviction); publish the release again"
        )

    def hot_ids(self, release: str, table: str) -> NDArray[np.int64]:
        record = self._record(release)
        info = record.manifest.table(table)
        if not info.hot_ids:
            return np.empty(0, np.int64)
        with self.errors():
            content = cast(bytes | None, self.control.get(self.key(record.namespace, table, "hot")))
        return np.frombuffer(content or b"", "<i8").astype(np.int64)

    def writer(self, manifest: ReleaseManifest) -> ReleaseWriter:
        self.contains(manifest)
        return RedisWriter(self, manifest)

    def close(self) -> None:
        self._wire.close()
        self.control.close()

    def _record(self, release: str) -> _Record:
        known = self._records.get(release)
        if known is None:
            with self.errors():
                value = cast(bytes | None, self.control.hget(self.key("releases"), release))
                if value is None:
                    names = cast(list[bytes], self.control.hkeys(self.key("releases")))
                    having = ", ".join(sorted(name.decode() for name in names)) or "none"
                    raise UnknownRelease(f"no release {release!r} in {self.address}; it has: {having}")
            known = self._records[release] = self._decode(release, value)
        return known

    def _decode(self, release: str, value: bytes) -> _Record:
        try:
            return msgspec.json.decode(value, type=_Record)
        except msgspec.DecodeError as error:
            raise InvalidRelease(f"{self.address}: the record of {release} cannot be read: {error}") from error

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what redis-py raises into this package's errors; none of them repeats credentials."""
        try:
            yield
        except redis.AuthenticationError as error:
            raise StoreUnavailable(f"{self.address} refused the credentials: {error}") from error
        except redis.TimeoutError as error:
            raise StoreUnavailable(f"{self.address} did not answer within {self._address.timeout:g} s") from error
        except redis.BusyLoadingError as error:
            raise StoreUnavailable(f"{self.address} is still loading its data") from error
        except redis.ConnectionError as error:
            raise StoreUnavailable(f"{self.address} cannot be reached: {error}") from error
        except redis.OutOfMemoryError as error:
            raise StoreUnavailable(f"{self.address} has no memory left for writing: {error}") from error
        except redis.RedisError as error:
            raise StoreError(f"{self.address} answered: {error}") from error


class Batches:
    """Commands of a fetch, as few and as large as may be."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def add(self, prefix: bytes, ids: NDArray[np.int64], table: TableInfo) -> None:
        for start in range(0, len(ids), _MOST_COMMANDS):
            part = ids[start : start + _MOST_COMMANDS]
            data = encode_getrange(prefix, part, table.page_rows, table.row_bytes)
            if self.batches and self.batches[-1][1] + len(part) <= _MOST_COMMANDS:
                before, count = self.batches.pop()
                self.batches.append((b"".join((before, data)), count + len(part)))
            else:
                self.batches.append((data, len(part)))


class RedisWriter(ReleaseWriter):
    def __init__(self, backend: RedisBackend, manifest: ReleaseManifest) -> None:
        self._backend = backend
        self._manifest = manifest
        self._namespace = namespace(manifest)
        with backend.errors():
            backend.control.hset(backend.key("writing"), self._namespace, cast(str, self._record()))

    def write(self, table: TableInfo, first_page: int, data: memoryview) -> None:
        page_bytes = table.page_rows * table.row_bytes
        with self._backend.errors(), self._backend.control.pipeline(transaction=False) as pipeline:
            for start in range(0, len(data), page_bytes):
                key = self._key(table, first_page + start // page_bytes)
                pipeline.set(key, bytes(data[start : start + page_bytes]))
            pipeline.execute()

    def read(self, table: TableInfo, first_page: int, pages: int) -> bytes:
        with self._backend.errors(), self._backend.control.pipeline(transaction=False) as pipeline:
            for page in range(first_page, first_page + pages):
                pipeline.get(self._key(table, page))
            return b"".join(content or b"" for content in cast(list[bytes | None], pipeline.execute()))

    def write_hot(self, table: TableInfo, ids: bytes) -> None:
        with self._backend.errors():
            self._backend.control.set(self._key(table, "hot"), ids)

    def read_hot(self, table: TableInfo) -> bytes:
        with self._backend.errors():
            return cast(bytes | None, self._backend.control.get(self._key(table, "hot"))) or b""

    def mark_verified(self, table: TableInfo) -> None:
        with self._backend.errors():
            self._backend.control.sadd(self._backend.key(self._namespace, "verified"), table.name)

    def verified(self) -> frozenset[str]:
        with self._backend.errors():
            names = cast(set[bytes], self._backend.control.smembers(self._backend.key(self._namespace, "verified")))
        return frozenset(name.decode() for name in names)

    def commit(self) -> None:
        name = self._manifest.name
        keys = [self._backend.key(*parts) for parts in (("releases",), ("writing",), (self._namespace, "verified"))]
        with self._backend.errors():
            done = self._backend.control.eval(
                _COMMIT, len(keys), *keys, name, cast(str, self._record()), self._namespace
            )
        if not done:
            raise conflict(self._backend.address, name)

    def close(self) -> None:
        """Connections belong to the backend."""

    def _record(self) -> bytes:
        return msgspec.json.encode(_Record(self._namespace, self._manifest))

    def _key(self, table: TableInfo, what: int | str) -> str:
        return self._backend.key(self._namespace, table.name, what)


def _control(address: RedisAddress) -> redis.Redis:
    """One retry over a new connection, for those that the server closed while idle; none after a timeout."""
    where: dict[str, Any] = {"host": address.host, "port": address.port, "ssl": address.tls}
    if address.tls and address.ca_file:
        where["ssl_ca_certs"] = address.ca_file
    if address.socket is not None:
        where = {"unix_socket_path": address.socket}
    return redis.Redis(
        **where,
        db=address.db,
        username=address.username,
        password=address.password,
        socket_timeout=address.timeout,
        socket_connect_timeout=address.timeout,
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        protocol=2,
    )


def _history(value: bytes | None) -> History:
    return () if value is None else msgspec.json.decode(value, type=History)


def _scatter(present: NDArray[np.uint8], rows: NDArray[np.uint8], found: NDArray[np.bool_]) -> NDArray[np.uint8]:
    rows[found] = present
    return rows
