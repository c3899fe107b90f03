"""One fetch of rows as commands for pages, independent of which node is asked for which of them."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.buckets import buckets_of
from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import ABSENT, UNAVAILABLE
from embedding_store.redis_keys import Record, page_key
from embedding_store.redis_wire import (
    ANSWERED,
    DAMAGED,
    LOST,
    PAGE_ROWS,
    PAGES,
    REFUSED,
    ROW_BYTES,
    ROWS,
    SPARSE,
    WAITING,
    decode,
    encode,
)
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.row_checks import table_seed

Decoded = tuple[int, int, int, bool]

_FAULTS = {  # by the outcome of a command
    LOST: "lost {} (evicted or deleted? maxmemory-policy must be noeviction); torchrank publish BUNDLE --store URL "
    "writes it again",
    DAMAGED: "a damaged {} (cut off, or other bytes than were published); torchrank verify BUNDLE --store URL --mend "
    "writes it again",
}


class PageKeys:
    """Where the pages of a release's tables are, as arrays by the table's place in the manifest.

    prefixes uint8: the keys without the page's number, one after another; ends int64 [tables + 1] says which is whose.
    geometry int64 [tables, 6]: rows, rows of a page, bytes of an encoded row, whether its ids are sparse, pages or
    buckets, and the bits of the seed of its rows' checks.
    """

    def __init__(self, prefix: str, record: Record) -> None:
        self.record = record
        tables = record.manifest.tables
        prefixes = [page_key(prefix, record.namespace, table.name, "").encode() for table in tables]
        self.prefixes = np.frombuffer(b"".join(prefixes), np.uint8)
        self.ends = np.cumsum([0, *map(len, prefixes)])
        described = [
            [table.rows, table.page_rows, table.row_bytes, table.sparse, table.pages, table_seed(table).view(np.int64)]
            for table in tables
        ]
        self.geometry = np.array(described, np.int64).reshape(-1, 6)
        self.widths = self.geometry[:, ROW_BYTES].copy()


@njit(cache=True, nogil=True)
def _locate(tables, counts, ids, geometry, status, targets, command_tables, pages, begins, members):  # type: ignore[no-untyped-def]
    """Fills the arrays of PageFetch; returns the number of commands."""
    first = commands = placed = target = 0
    for part in range(len(tables)):
        table, last = tables[part], first + counts[part]
        width, sparse = geometry[table, ROW_BYTES], geometry[table, SPARSE]
        if sparse:
            buckets = buckets_of(ids[first:last], geometry[table, PAGES])
            order = np.argsort(buckets)
        for i in range(last - first):
            position = first + (order[i] if sparse else i)
            row = ids[position]
            targets[position] = target + (position - first) * width
            if not sparse and not 0 <= row < geometry[table, ROWS]:
                status[position] = ABSENT
                continue
            status[position] = UNAVAILABLE  # until it comes
            page = buckets[order[i]] if sparse else row // geometry[table, PAGE_ROWS]
            if not sparse or i == 0 or page != pages[commands - 1]:
                command_tables[commands], pages[commands], begins[commands] = table, page, placed
                commands += 1
            members[placed] = position
            placed += 1
        target += (last - first) * width
        first = last
    begins[commands] = placed
    return commands


class PageFetch:
    """What a batch of ids asks, and what has come of it. For one thread.

    Of k commands: tables, pages int64 [k], the page each asks for; outcome uint8 [k], see `redis_wire`. Command c is
    for the ids at members[begins[c] : begins[c + 1]].
    """

    def __init__(self, keys: PageKeys, batch: IdBatch) -> None:
        n = len(batch.ids)
        # Copies: kernels are compiled for arrays that may be written to, and these may be views of a frame.
        tables, counts, self._ids = np.array(batch.tables), np.array(batch.counts), np.array(batch.ids)
        self.keys = keys
        self.rows = np.empty(int(counts.dot(keys.widths[tables])), np.uint8)
        self.status = np.empty(n, np.uint8)
        self.tables, self.pages, self.begins, self._members, self._targets = np.empty((5, n + 1), np.int64)
        self.size = _locate(
            tables, counts, self._ids, keys.geometry, self.status, self._targets, self.tables, self.pages,
            self.begins, self._members,
        )  # fmt: skip
        self.outcome = np.zeros(self.size, np.uint8)  # WAITING
        self._errors: dict[str, StoreUnavailable] = {}

    def all(self) -> NDArray[np.int64]:
        return np.arange(self.size)

    def having(self, commands: NDArray[np.int64], outcome: int) -> NDArray[np.int64]:
        """Those of the commands, int64 [m], that have this outcome so far."""
        chosen: NDArray[np.int64] = commands[self.outcome[commands] == outcome]
        return chosen

    def ask_again(self, commands: NDArray[np.int64]) -> None:
        self.outcome[commands] = WAITING

    def unanswered(self, commands: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the commands that a node has left, or refused."""
        outcome = self.outcome[commands]
        left: NDArray[np.int64] = commands[(outcome == WAITING) | (outcome == REFUSED)]
        return left

    def without_row(self, commands: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the commands that have no answer, or whose page the node that was asked has not, or damaged."""
        left: NDArray[np.int64] = commands[self.outcome[commands] != ANSWERED]
        return left

    def encode(
        self, commands: NDArray[np.int64], first: int, most: int, asking: bool, buffer: NDArray[np.uint8]
    ) -> tuple[int, int]:
        """See `redis_wire.encode`."""
        keys = self.keys
        encoded: tuple[int, int] = encode(
            commands, first, most, asking, self.tables, self.pages, self.begins, self._members, self._ids,
            keys.prefixes, keys.ends, keys.geometry, buffer,
        )  # fmt: skip
        return encoded

    def decode(
        self, buffer: NDArray[np.uint8], at: int, end: int, commands: NDArray[np.int64], replies: int, asking: bool,
        errors: NDArray[np.int64],
    ) -> Decoded:  # fmt: skip
        """See `redis_wire.decode`."""
        decoded: Decoded = decode(
            buffer, at, end, commands, replies, asking, self.tables, self.pages, self.begins, self._members, self._ids,
            self._targets, self.keys.geometry, self.rows, self.status, self.outcome, errors,
        )  # fmt: skip
        return decoded

    def fail(self, error: StoreUnavailable) -> None:
        """Why some rows are not to be had; the same of several nodes or commands is kept once."""
        self._errors.setdefault(str(error), error)

    def result(self, address: object) -> FetchedRows:
        for outcome, what in _FAULTS.items():
            command = self.outcome.tobytes().find(outcome)
            if command >= 0:
                self.fail(StoreUnavailable(f"{address} has {what.format(self._page(command))}"))
        errors = list(self._errors.values())
        error = StoreUnavailable("; ".join(map(str, errors))) if len(errors) > 1 else errors[0] if errors else None
        return FetchedRows(self.rows, self.status, error)

    def _page(self, command: int) -> str:
        manifest = self.keys.record.manifest
        return f"page {self.pages[command]} of table {manifest.tables[self.tables[command]].name!r} of {manifest.name}"


@cache
def compile_kernels() -> None:
    """On a host where they have never run that takes seconds, which no caller's deadline has room for."""
    table = TableInfo(name="t", rows=1, dim=1, codec="fp32", row_bytes=4, page_rows=1, sha256="")
    nothing = np.empty(0, np.int64)
    keys = PageKeys("p", Record("", ReleaseManifest("", "", "", (table,))))
    fetch, buffer = PageFetch(keys, IdBatch(nothing, nothing, nothing)), np.empty(1, np.uint8)
    fetch.encode(nothing, 0, 0, False, buffer)
    fetch.decode(buffer, 0, 0, nothing, 0, False, np.empty((1, 3), np.int64))
