"""A checkpoint's table as the files of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding_store.pages import PageWriter
from embedding_store.release import Codec, TableInfo
from embedding_store.sparse_pages import SparsePageWriter
from export.checkpoint_tables import CheckpointTables

Take = Callable[[NDArray[np.int64], NDArray[np.float32]], None]


def write_table(
    saved: CheckpointTables, name: str, folder: Path, codec: Codec, hot_ids: NDArray[np.int64], take: Take
) -> TableInfo:
    """A table whose rows have raw ids in the checkpoint becomes a sparse one.

    `take` sees all of it on the way: ids int64 [n] and their rows float32 [n, dim]. Raises InvalidRelease for rows that
    the codec cannot hold, and for an id that two rows have.
    """
    table = saved.tables[name]
    if table.ids_key is not None:
        with SparsePageWriter(folder, name, codec, table.dim) as sparse_writer:
            for ids, rows in zip(saved.raw_ids(name), saved.chunks(name), strict=True):
                sparse_writer.append(ids, rows)
                take(ids, rows)
            return sparse_writer.finish(hot_ids=hot_ids)
    with PageWriter(folder, name, codec, table.dim) as writer:
        first_id = 0
        for rows in saved.chunks(name):
            writer.append(rows)
            take(np.arange(first_id, first_id + len(rows)), rows)
            first_id += len(rows)
        return writer.finish(hot_ids=hot_ids)
