"""A store that holds whole tables in memory: for tests, for trying things out, and for models that are that small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import IdBatch
from embedding_store.errors import InvalidRelease, UnknownRelease
from embedding_store.lookup import ABSENT, FOUND, LookupReply, TableRows
from embedding_store.release import ReleaseEntry, ReleaseManifest, TableInfo
from embedding_store.release_view import default_row
from embedding_store.served import ServedLookup, ServedStats
from embedding_store.sparse import NOT_THERE, find_rows, mixed_ids


class _Table(NamedTuple):
    rows: NDArray[np.uint8]  # [rows + 1, row_bytes]: the last is the default row
    ids: NDArray[np.int64] | None  # of the rows, in the order of `sparse.py`; None: 0, 1, …

    def find(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Encoded rows uint8 [n, row_bytes] and their status uint8 [n]."""
        places = np.where(ids < len(self.rows) - 1, ids, NOT_THERE) if self.ids is None else find_rows(self.ids, ids)
        known = places >= 0
        return self.rows[np.where(known, places, -1)], np.where(known, FOUND, ABSENT).astype(np.uint8)


class _Release(NamedTuple):
    manifest: ReleaseManifest
    tables: dict[str, _Table]


class MemoryStore(ServedLookup):
    """Thread-safe as long as `add` is not called beside look-ups."""

    def __init__(self) -> None:
        self._releases: dict[str, _Release] = {}
        self._active: dict[str, str] = {}

    def add(
        self,
        manifest: ReleaseManifest,
        tables: Mapping[str, NDArray[np.uint8]],
        ids: Mapping[str, NDArray[np.int64]] | None = None,
        *,
        activate: bool = True,
    ) -> None:
        """tables: encoded rows uint8 [rows, row_bytes]; ids: int64 [rows], those of the rows of each sparse table.

        Raises InvalidRelease where they do not fit the manifest.
        """
        added = {info.name: _table(info, tables[info.name], (ids or {}).get(info.name)) for info in manifest.tables}
        self._releases[manifest.name] = _Release(manifest, added)
        if activate:
            self._active[manifest.model] = manifest.name

    def manifest(
        self, release: str | None = None, *, model: str | None = None, timeout: float | None = None
    ) -> ReleaseManifest:
        """`timeout` has no effect: nothing here waits."""
        if release is None:
            release = self._active_release(model)
        return self._release(release).manifest

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """`timeout` has no effect: nothing here waits."""
        found = self._release(release)
        answer = {}
        for name, wanted in ids.items():
            found.manifest.table(name)  # raises UnknownTable
            rows, status = found.tables[name].find(wanted)
            answer[name] = TableRows(rows, status, np.arange(len(wanted), dtype=np.int64))
        return LookupReply(release, answer)

    def begin(
        self,
        release: str,
        batch: IdBatch,
        out: NDArray[np.uint8],
        starts: NDArray[np.int64],
        status: NDArray[np.uint8],
    ) -> None:
        found = self._release(release)
        first = 0
        for table, count, start in zip(batch.tables.tolist(), batch.counts.tolist(), starts.tolist(), strict=True):
            rows, statuses = found.tables[found.manifest.tables[table].name].find(batch.ids[first : first + count])
            out[start : start + rows.size] = rows.reshape(-1)
            status[first : first + count] = statuses
            first += count

    def releases(self) -> Sequence[ReleaseEntry]:
        entries = []
        for name, (manifest, _) in sorted(self._releases.items()):
            active = self._active.get(manifest.model) == name
            entries.append(ReleaseEntry(name, manifest.model, manifest.version, manifest.created, active))
        return entries

    def active(self) -> Mapping[str, str]:
        return dict(self._active)

    def warm(self, release: str) -> int:
        """Everything is warm: the rows of all tables."""
        return sum(table.rows for table in self._release(release).manifest.tables)

    def stats(self) -> ServedStats:
        held = sum(table.rows.nbytes for found in self._releases.values() for table in found.tables.values())
        return ServedStats("memory", hits=0, misses=0, cache_bytes=held, cache_capacity_bytes=held)

    def close(self) -> None:
        self._releases.clear()
        self._active.clear()

    def _release(self, name: str) -> _Release:
        if name not in self._releases:
            raise UnknownRelease(f"no release {name!r} in memory; it has: {', '.join(self._releases) or 'none'}")
        return self._releases[name]

    def _active_release(self, model: str | None) -> str:
        active = [self._active[model]] if model in self._active else [] if model else sorted(self._active.values())
        if len(active) != 1:
            raise UnknownRelease(f"{len(active)} active releases of {model or 'any model'} in memory; name one")
        return active[0]


def _table(info: TableInfo, rows: NDArray[np.uint8], ids: NDArray[np.int64] | None) -> _Table:
    if rows.shape != (info.rows, info.row_bytes) or rows.dtype != np.uint8:
        raise InvalidRelease(
            f"table {info.name!r} is {rows.dtype} {rows.shape}; its manifest says uint8 {(info.rows, info.row_bytes)}"
        )
    if info.sparse != (ids is not None) or (ids is not None and len(np.unique(ids)) != info.rows):
        has = "no ids" if ids is None else f"{len(np.unique(ids))} distinct ids"
        raise InvalidRelease(f"table {info.name!r} has {has}; its manifest says {info.rows} rows of {info.ids} ids")
    if ids is not None:
        order = np.argsort(mixed_ids(ids))
        ids, rows = ids[order], rows[order]
    return _Table(np.concatenate((rows, default_row(info)[None])), ids)
