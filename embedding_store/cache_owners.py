"""Who owns the entries of the hot-id cache: a number for every table of every release that lives."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.cache_columns import (
    ABSENTS,
    CLASS,
    DEFAULT,
    ENTRIES,
    EVICTIONS,
    HELD_BY,
    HELD_SALT,
    HELD_SPARSE,
    HITS,
    MISSES,
    MODEL,
    OWNER,
    OWNER_COLUMNS,
    PLACE,
    PLACE_BITS,
    REJECTIONS,
    RELEASE,
    SALT,
    SPARSE,
    TABLE_COLUMNS,
)
from embedding_store.release import ReleaseManifest
from embedding_store.release_view import default_row

_PLACES = 1 << PLACE_BITS
_GENERATIONS = 1 << (32 - PLACE_BITS)


@dataclass(frozen=True, slots=True)
class TableStats:
    """Counted per distinct id of a look-up: hits + misses = ids asked; `absent` of them the table does not have."""

    hits: int
    misses: int
    absent: int
    evictions: int  # entries that made room
    rejected: int  # those of them that were not asked for again after they came
    entries: int


@dataclass(frozen=True, slots=True)
class CachedTables:
    """A release's tables as the kernels want them; columns: int64 [tables, 6], defaults: uint8, the default rows."""

    manifest: ReleaseManifest
    columns: NDArray[np.int64]
    defaults: NDArray[np.uint8]


class Owners:
    """Numbers that are never given twice: an entry of a release that is gone can be taken for nobody else's, though it
    stays in its set until it is overwritten.

    lines: int64 [places, 16], see `cache_columns`. A number is a place and how often that was given out before.
    """

    def __init__(self) -> None:
        lines = np.zeros((_PLACES * OWNER_COLUMNS) + 8, np.int64)  # pages that no owner uses take no memory
        start = -lines.ctypes.data % 64 // 8
        self.lines = lines[start : start + _PLACES * OWNER_COLUMNS].reshape(_PLACES, OWNER_COLUMNS)
        self._free = deque(range(1, _PLACES))  # 0 would make the number 0, an empty way's
        self._generation = np.zeros(_PLACES, np.int64)
        self._releases = 0  # so far
        self._models: dict[str, int] = {}

    def add(self, manifest: ReleaseManifest, classes: list[int], salts: list[int]) -> CachedTables:
        """classes, salts: of the manifest's tables, see `cache_columns` and `cache_set.set_number`.

        Raises ValueError when there are more tables than places.
        """
        tables = manifest.tables
        if len(tables) > len(self._free):
            raise ValueError(f"{manifest.name}: the cache knows at most {_PLACES - 1} tables of all releases in use")
        columns = np.zeros((len(tables), TABLE_COLUMNS), np.int64)
        columns[:, CLASS] = classes
        columns[:, SALT] = salts
        columns[:, SPARSE] = [table.sparse for table in tables]
        widths = np.array([table.row_bytes for table in tables], np.int64)
        columns[:, DEFAULT] = np.cumsum(widths) - widths
        self._releases += 1
        model = self._models.setdefault(manifest.model, len(self._models) + 1)
        for table in columns:
            place = self._free.popleft()
            table[PLACE], table[OWNER] = place, self._generation[place] << PLACE_BITS | place
            line = self.lines[place]
            line[:] = 0
            line[[RELEASE, MODEL]] = self._releases, model
            line[[HELD_SALT, HELD_SPARSE]] = table[SALT], table[SPARSE]
            line[HELD_BY] = table[OWNER]
        defaults = [default_row(table) for table in tables]
        return CachedTables(manifest, columns, np.concatenate(defaults) if defaults else np.empty(0, np.uint8))

    def remove(self, tables: CachedTables) -> None:
        for place in tables.columns[:, PLACE]:
            self.lines[place, HELD_BY] = 0
            self._generation[place] += 1
            if self._generation[place] < _GENERATIONS:
                self._free.append(place)

    def stats(self, tables: CachedTables) -> dict[str, TableStats]:
        """By table."""
        lines = self.lines[tables.columns[:, PLACE]]
        counters = lines[:, [HITS, MISSES, ABSENTS, EVICTIONS, REJECTIONS, ENTRIES]].tolist()
        return {
            table.name: TableStats(hits, misses, absent, evicted + rejected, rejected, entries)
            for table, (hits, misses, absent, evicted, rejected, entries) in zip(
                tables.manifest.tables, counters, strict=True
            )
        }
