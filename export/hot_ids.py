"""How often the training data reads each row: which ones a cache should hold first, and what it would gain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrank.data.loader import Loader
from torchrank.features.batch import FeatureBatch, SideBatch
from torchrank.features.schema import FeatureSchema


@dataclass(frozen=True, slots=True)
class IdCounts:
    """Of one table."""

    reads: NDArray[np.int64]  # [rows]: how often the row was named
    asked: NDArray[np.int64]  # [rows]: how many requests named it, which is how often a store is asked for it


def count_ids(loader: Loader, schema: FeatureSchema, max_rows: int) -> tuple[dict[str, IdCounts], int]:
    """Counts per table in about `max_rows` rows of `loader`, and how many requests those were.

    A request that a batch border cuts in two counts as two.
    """
    counts = {
        table.name: IdCounts(np.zeros(table.rows, np.int64), np.zeros(table.rows, np.int64)) for table in schema.tables
    }
    seen = requests = 0
    with closing(loader.epoch(0)) as batches:
        for batch in batches:
            named = dict(_named(batch.features))
            for table in schema.tables:
                ids = np.concatenate([named[feature][0] for feature in table.features])
                of_request = np.concatenate([named[feature][1] for feature in table.features])
                once = np.unique(of_request * table.rows + ids) % table.rows
                np.add.at(counts[table.name].reads, ids, 1)
                np.add.at(counts[table.name].asked, once, 1)
            seen += batch.rows
            requests += batch.features.user.rows
            if seen >= max_rows:
                break
    return counts, requests


def _named(features: FeatureBatch) -> Iterator[tuple[str, tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Per sparse feature its ids, int64 [nnz], and the request of each, int64 [nnz]."""
    sides: tuple[tuple[SideBatch, NDArray[np.int64]], ...] = (
        (features.user, np.arange(features.user.rows)),
        (features.item, features.user_index),
    )
    for side, request in sides:
        for name, ids in side.sparse.items():
            yield name, (ids.values, np.repeat(request, ids.lengths))


def hottest(reads: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """int64 [≤ limit]: ids that were read at all, most frequent first; the smaller id first among equals."""
    seen = np.flatnonzero(reads)
    return seen[np.argsort(-reads[seen], kind="stable")][:limit].astype(np.int64)
