"""The pages of one release in a Redis, by redis-py: one string each, see `redis_keys.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import redis
from numpy.typing import NDArray

from embedding_store.buckets import HEAD_BYTES, ID_BYTES, encode_buckets
from embedding_store.chunks import Chunk, page_bounds
from embedding_store.page_store import CHANGED, LOST, SAME, PageStore, nothing
from embedding_store.redis_keys import page_key
from embedding_store.release import TableInfo
from embedding_store.row_checks import table_seed

if TYPE_CHECKING:
    from embedding_store.redis_backend import RedisBackend

_PIPELINE = 4096  # commands


class RedisPages(PageStore):
    def __init__(self, backend: RedisBackend, namespace: str) -> None:
        self._backend = backend
        self._namespace = namespace

    @property
    def address(self) -> str:
        return self._backend.address

    def write(self, table: TableInfo, chunk: Chunk) -> None:
        """SET of whole strings, whatever was there."""
        pages = iter(_page_strings(table, chunk))
        for keys in self._keys(table, chunk.first_page, chunk.end):
            with self._backend.errors(), self._backend.control.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.set(key, next(pages))
                pipeline.execute()

    def compare(self, table: TableInfo, chunk: Chunk) -> NDArray[np.uint8]:
        found = [value for keys in self._keys(table, chunk.first_page, chunk.end) for value in self._ask("get", keys)]
        states = [
            SAME if one == other else LOST if one is None else CHANGED
            for one, other in zip(found, _page_strings(table, chunk), strict=True)
        ]
        return np.array(states, np.uint8)

    def write_hot(self, table: TableInfo, ids: bytes) -> None:
        with self._backend.errors():
            self._backend.control.set(self._key(table, "hot"), ids)

    def read_hot(self, table: TableInfo) -> bytes | None:
        (value,) = self._ask("get", (self._key(table, "hot"),))
        return value if isinstance(value, bytes) else None

    def lost_pages(self, table: TableInfo, meanwhile: Callable[[], None] = nothing) -> int:
        lengths = []
        for keys in self._keys(table, 0, table.pages):
            lengths += [answer if isinstance(answer, int) else 0 for answer in self._ask("strlen", keys)]
            meanwhile()
        return _wrong_lengths(table, np.array(lengths, np.int64))

    def sync(self, table: TableInfo) -> None:
        """How durable a server is, its own settings say."""

    def _ask(self, command: Literal["get", "strlen"], keys: Sequence[str]) -> list[object]:
        """The answers; for a key that holds no string, redis-py's error."""
        with self._backend.errors(), self._backend.control.pipeline(transaction=False) as pipeline:
            for key in keys:
                getattr(pipeline, command)(key)
            answers = cast(list[object], pipeline.execute(raise_on_error=False))
            for answer in answers:
                if isinstance(answer, Exception) and not _is_wrong_type(answer):
                    raise answer
        return answers

    def _keys(self, table: TableInfo, first: int, end: int) -> Iterator[list[str]]:
        """Of these pages, as many as go into one pipeline."""
        for start in range(first, end, _PIPELINE):
            yield [self._key(table, number) for number in range(start, min(start + _PIPELINE, end))]

    def _key(self, table: TableInfo, what: int | str) -> str:
        return page_key(self._backend.prefix, self._namespace, table.name, what)


def _page_strings(table: TableInfo, chunk: Chunk) -> list[bytes]:
    """The value of each page, or bucket, of the chunk."""
    if table.sparse:
        encoded, starts = encode_buckets(table_seed(table), chunk.first_page, chunk.ids, chunk.rows, chunk.bounds)
    else:
        encoded, starts = chunk.rows.reshape(-1), chunk.bounds * table.stored_bytes
    content, places = encoded.data, starts.tolist()
    return [bytes(content[start:end]) for start, end in itertools.pairwise(places)]


def _wrong_lengths(table: TableInfo, lengths: NDArray[np.int64]) -> int:
    """lengths: int64 [pages] of the strings. How many rows a bucket has is not known here, only how many all have: a
    bucket that lacks just some whole rows makes one wrong length."""
    if not table.sparse:
        return int(np.count_nonzero(lengths != np.diff(page_bounds(table, 0, table.pages)) * table.stored_bytes))
    rows, rest = np.divmod(lengths - HEAD_BYTES, ID_BYTES + table.stored_bytes)
    wrong = int(np.count_nonzero((rest != 0) | (rows < 0)))
    return wrong or int(rows.sum() != table.rows)


def _is_wrong_type(error: Exception) -> bool:
    return isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error)
