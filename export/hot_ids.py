"""Which rows a cache should hold first: the ids that the training data reads most."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from torchrank.data.loader import Loader
from torchrank.features.schema import FeatureSchema


def count_ids(loader: Loader, schema: FeatureSchema, max_rows: int) -> dict[str, NDArray[np.int64]]:
    """How often each table's rows are read in about `max_rows` rows of `loader`: int64 [rows] per table."""
    counts = {table.name: np.zeros(table.rows, np.int64) for table in schema.tables}
    seen = 0
    with closing(loader.epoch(0)) as batches:
        for batch in batches:
            sparse = {**batch.features.user.sparse, **batch.features.item.sparse}
            for table in schema.tables:
                for feature in table.features:
                    np.add.at(counts[table.name], sparse[feature].values, 1)
            seen += batch.rows
            if seen >= max_rows:
                break
    return counts


def hottest(counts: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """int64 [≤ limit]: ids that were read at all, most frequent first; the smaller id first among equals."""
    seen = np.flatnonzero(counts)
    return seen[np.argsort(-counts[seen], kind="stable")][:limit].astype(np.int64)
