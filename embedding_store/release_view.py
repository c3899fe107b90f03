"""What a look-up needs of a release, laid out for kernels: by the table's place in the manifest."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.batch import IdBatch, row_offsets
from embedding_store.release import ReleaseManifest, TableInfo


def default_row(table: TableInfo) -> NDArray[np.uint8]:
    """uint8 [row_bytes]."""
    if not table.default_row:
        return np.zeros(table.row_bytes, np.uint8)
    return np.frombuffer(table.default_row, np.uint8).copy()  # writable, as zeros are: one type for the kernels


class ReleaseView:
    """widths: int64 [T], bytes of a row."""

    def __init__(self, manifest: ReleaseManifest) -> None:
        self.manifest = manifest
        self.places = manifest.places
        self.widths = np.array([table.row_bytes for table in manifest.tables], np.int64)
        self._defaults = np.concatenate([default_row(table) for table in manifest.tables] or [np.empty(0, np.uint8)])
        self._default_starts = np.cumsum(self.widths) - self.widths

    def fill_defaults(
        self, batch: IdBatch, positions: NDArray[np.int64], out: NDArray[np.uint8], starts: NDArray[np.int64]
    ) -> None:
        """Writes the tables' default rows at these positions; out, starts: as in `EmbeddingStore.begin`."""
        offsets = row_offsets(batch.tables, batch.counts, self.widths, starts)
        mine = batch.select(positions)
        _fill(mine.tables, mine.counts, positions, self.widths, self._defaults, self._default_starts, out, offsets)


@njit(cache=True, nogil=True)
def _fill(tables, counts, positions, widths, defaults, default_starts, out, offsets):  # type: ignore[no-untyped-def]
    i = 0
    for k in range(len(tables)):
        width, source = widths[tables[k]], default_starts[tables[k]]
        for _ in range(counts[k]):
            target = offsets[positions[i]]
            for byte in range(width):
                out[target + byte] = defaults[source + byte]
            i += 1
