"""Ids of several tables as flat arrays, and the rows that answer them: what travels between look-up, cache and backend.

One array for all tables, and not one per table: a request names some twenty tables with few ids each, and twenty small
calls would cost more than the work in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import FOUND
from embedding_store.release import ReleaseManifest


@njit(cache=True, nogil=True)
def _select(
    counts: NDArray[np.int64], ids: NDArray[np.int64], positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(counts, ids) of these positions. A tenth of the time of searchsorted, diff and take."""
    chosen, selected = np.zeros_like(counts), np.empty_like(positions)
    k = end = 0
    for i in range(len(positions)):
        selected[i] = ids[positions[i]]
        while positions[i] >= end:
            end += counts[k]
            k += 1
        chosen[k - 1] += 1
    return chosen, selected


@dataclass(frozen=True, slots=True)
class IdBatch:
    """Ids of some tables of one release, table after table.

    tables: int64 [t], places in `manifest.tables`; counts: int64 [t], ids per table, 0 allowed; ids: int64 [Σ counts].
    """

    tables: NDArray[np.int64]
    counts: NDArray[np.int64]
    ids: NDArray[np.int64]

    def select(self, positions: NDArray[np.int64]) -> IdBatch:
        """The ids at these positions, int64 [k] ascending; every table stays, maybe with none."""
        return IdBatch(self.tables, *_select(self.counts, self.ids, positions))


@dataclass(frozen=True, slots=True)
class FetchedRows:
    """A backend's answer to an IdBatch, in the order of its ids.

    rows: uint8 [Σ counts x row_bytes], encoded, undefined where the status is not FOUND; status: uint8 [n], FOUND,
    ABSENT or UNAVAILABLE; error: why some are UNAVAILABLE, None where none is.
    """

    rows: NDArray[np.uint8]
    status: NDArray[np.uint8]
    error: StoreUnavailable | None = None


def batch_of(manifest: ReleaseManifest, ids: Mapping[str, NDArray[np.int64]]) -> IdBatch:
    """Raises UnknownTable, and ValueError where ids are not int64 [n]."""
    places = manifest.places
    for name, wanted in ids.items():
        if name not in places:
            manifest.table(name)  # raises
        if wanted.dtype != np.int64 or wanted.ndim != 1:
            raise ValueError(f"table {name!r}: ids must be int64 [n], not {wanted.dtype} {list(wanted.shape)}")
    return IdBatch(
        np.array([places[name] for name in ids], np.int64),
        np.array([len(wanted) for wanted in ids.values()], np.int64),
        np.concatenate(list(ids.values())) if ids else np.empty(0, np.int64),
    )


def row_starts(batch: IdBatch, widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [t + 1]: where each table's rows begin when they lie one after another, and where the last ends.

    widths: int64, bytes of a row by the table's place in the manifest.
    """
    return _row_starts(batch.tables, batch.counts, widths)


@njit(cache=True, nogil=True)
def _row_starts(tables: NDArray[np.int64], counts: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.zeros(len(counts) + 1, np.int64)
    for k in range(len(counts)):
        starts[k + 1] = starts[k] + counts[k] * widths[tables[k]]
    return starts


@njit(cache=True, nogil=True)
def row_offsets(
    tables: NDArray[np.int64], counts: NDArray[np.int64], widths: NDArray[np.int64], starts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [Σ counts]: where the row of each id begins, table k's rows at starts[k], one after another."""
    offsets = np.empty(counts.sum(), np.int64)
    i = 0
    for k in range(len(tables)):
        for row in range(counts[k]):
            offsets[i] = starts[k] + row * widths[tables[k]]
            i += 1
    return offsets


@njit(cache=True, nogil=True)
def copy_rows(  # type: ignore[no-untyped-def]
    rows, status, sources, places, tables, counts, widths, wanted, out, out_status, targets
):
    """Rows of another batch, as far as they are there: id i of this one (tables, counts) is at places[i] of that.

    rows, status, sources: of that batch, sources being its row offsets; out, out_status, targets: of this one, whose
    ids stand at wanted[i] there. A row is copied where it is FOUND, its status in any case.
    """
    i = 0
    for k in range(len(tables)):
        width = widths[tables[k]]
        for _ in range(counts[k]):
            place = places[i]
            out_status[wanted[i]] = status[place]
            if status[place] == FOUND:
                source, target = sources[place], targets[wanted[i]]
                for byte in range(width):
                    out[target + byte] = rows[source + byte]
            i += 1


@njit(cache=True, nogil=True)
def place_rows(  # type: ignore[no-untyped-def]
    rows, status, tables, counts, widths, positions, whole_counts, starts, out, out_status
):
    """What was fetched for `batch.select(positions)`, to where the look-up of the whole batch wants it.

    rows, status, tables, counts: of the selection, rows one after another; whole_counts: of the whole batch, whose
    rows of table k begin at starts[k] in `out`. Every status is written, a row where it is FOUND; returns how many are.
    """
    found = i = source = first = 0
    for k in range(len(tables)):
        width = widths[tables[k]]
        for _ in range(counts[k]):
            out_status[positions[i]] = status[i]
            if status[i] == FOUND:
                target = starts[k] + (positions[i] - first) * width
                for byte in range(width):
                    out[target + byte] = rows[source + byte]
                found += 1
            source += width
            i += 1
        first += whole_counts[k]
    return found
