"""Rows out of a Redis: an IdBatch becomes GETRANGE commands, their replies become rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import ABSENT, FOUND, UNAVAILABLE
from embedding_store.redis_keys import Record, page_key
from embedding_store.redis_url import RedisAddress
from embedding_store.redis_wire import Batch, RedisWire, encode_getrange
from embedding_store.release import TableInfo

_MOST_COMMANDS = 16384  # in one pipeline: bounds the buffers on both sides


class RedisReader:
    """Thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._wire = RedisWire(address)

    def fetch(self, record: Record, batch: IdBatch, *, timeout: float | None = None) -> FetchedRows:
        """See `Backend.fetch`."""
        tables = [(record.manifest.tables[place], ids) for place, ids in batch.by_table().items()]
        known = [(ids >= 0) & (ids < table.rows) for table, ids in tables]
        commands = Commands()
        for (table, ids), found in zip(tables, known, strict=True):
            prefix = page_key(self._address.prefix, record.namespace, table.name, "").encode()
            commands.add(prefix, ids[found], table)
        parts, status = [], []
        error: StoreUnavailable | None = None
        replies: list[bytes] | None = None
        try:
            replies = self._wire.call(commands.batches, timeout)
        except StoreUnavailable as unreachable:
            error = unreachable
        first = 0
        for (table, ids), found in zip(tables, known, strict=True):
            rows, code = np.zeros((len(ids), table.row_bytes), np.uint8), np.full(len(ids), ABSENT, np.uint8)
            last = first + int(np.count_nonzero(found))
            if replies is None:
                code[found] = UNAVAILABLE
            else:
                whole = np.array([len(reply) == table.row_bytes for reply in replies[first:last]], np.bool_)
                code[found] = np.where(whole, FOUND, UNAVAILABLE)
                joined = b"".join(reply for reply, good in zip(replies[first:last], whole, strict=True) if good)
                rows[code == FOUND] = np.frombuffer(joined, np.uint8).reshape(-1, table.row_bytes)
                if not whole.all():
                    error = error or self._lost(record, table, ids[code == UNAVAILABLE])
            parts.append(rows.reshape(-1))
            status.append(code)
            first = last
        empty = [np.empty(0, np.uint8)]
        return FetchedRows(np.concatenate(parts or empty), np.concatenate(status or empty), error)

    def _lost(self, record: Record, table: TableInfo, ids: NDArray[np.int64]) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self._address} has lost page {int(ids[0]) // table.page_rows} of table {table.name!r} of "
            f"{record.manifest.name} (evicted or deleted? maxmemory-policy must be noeviction); publish it again"
        )

    def close(self) -> None:
        self._wire.close()


class Commands:
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
