"""Publishing into a Redis, by redis-py."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import ReleaseWriter, conflict, namespace
from embedding_store.buckets import decode_buckets, encode_buckets
from embedding_store.redis_keys import Record, page_key
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.sparse_pages import BucketRun

if TYPE_CHECKING:
    from embedding_store.redis_backend import RedisBackend

_COMMIT = """
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 and redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[2], ARGV[3])
redis.call('DEL', KEYS[3])
return 1
"""


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

    def write_buckets(self, table: TableInfo, run: BucketRun) -> None:
        encoded, starts = encode_buckets(run.ids, run.rows, run.bounds)
        content, ends = encoded.tobytes(), starts.tolist()
        with self._backend.errors(), self._backend.control.pipeline(transaction=False) as pipeline:
            for bucket in range(run.buckets):
                pipeline.set(self._key(table, run.first_bucket + bucket), content[ends[bucket] : ends[bucket + 1]])
            pipeline.execute()

    def read_buckets(self, table: TableInfo, run: BucketRun) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        with self._backend.errors(), self._backend.control.pipeline(transaction=False) as pipeline:
            for bucket in range(run.first_bucket, run.first_bucket + run.buckets):
                pipeline.get(self._key(table, bucket))
            found = [content or b"" for content in cast(list[bytes | None], pipeline.execute())]
        starts = np.cumsum([0, *map(len, found)])
        return decode_buckets(np.frombuffer(b"".join(found), np.uint8), starts, table.row_bytes)

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
        return msgspec.json.encode(Record(self._namespace, self._manifest))

    def _key(self, table: TableInfo, what: int | str) -> str:
        return page_key(self._backend.prefix, self._namespace, table.name, what)
