"""What export counts of the training data, against a loop over its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedding_store.access_counts import read_counts
from export.build import ExportOptions, export_run
from export.hot_ids import count_ids, hottest
from torchrank.data import ParquetSource
from torchrank.data.loader import Loader
from torchrank.features.batch import FeatureBatch
from torchrank.features.transform import FeatureTransform
from torchrank.training.module import feature_schema
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run


def ids_of_request(features: FeatureBatch, request: int, feature: str) -> Iterator[int]:
    if feature in features.user.sparse:
        side, rows = features.user, [request]
    else:
        side, rows = features.item, np.flatnonzero(features.user_index == request).tolist()
    ids = side.sparse[feature]
    for row in rows:
        yield from ids.values[ids.offsets[row] : ids.offsets[row + 1]].tolist()


def counted(features: FeatureBatch, readers: tuple[str, ...]) -> tuple[Counter[int], Counter[int]]:
    """(reads, asked) of the table that these features read."""
    reads: Counter[int] = Counter()
    asked: Counter[int] = Counter()
    for request in range(features.user.rows):
        ids = [id for feature in readers for id in ids_of_request(features, request, feature)]
        reads.update(ids)
        asked.update(set(ids))
    return reads, asked


def test_reads_and_requests_of_every_row(tiny_run: Path, tiny_data: Path) -> None:
    config = Run(tiny_run).config()
    spec, schema = feature_schema(config)
    rows = pq.read_table(tiny_data / "train.parquet").combine_chunks().to_batches()[0]
    features = FeatureTransform(spec).from_arrow(rows, request_column="request_id")
    source = ParquetSource(str(tiny_data / "train.parquet"))
    loader = Loader(source, FeatureTransform(spec), (), rows.num_rows, request_column="request_id")
    counts, requests = count_ids(loader, schema, max_rows=1)  # one batch, which is the whole file
    assert requests == features.user.rows < rows.num_rows
    assert {table.name for table in schema.tables if len(table.features) > 1} == {"item_id"}
    for table in schema.tables:
        reads, asked = counted(features, table.features)
        assert Counter(dict(enumerate(counts[table.name].reads.tolist()))) == reads
        assert Counter(dict(enumerate(counts[table.name].asked.tolist()))) == asked
    assert counts["item_id"].asked.sum() < counts["item_id"].reads.sum()  # histories repeat, candidates are in them


def test_the_bundle_keeps_a_histogram_of_every_table(tiny_run: Path, tmp_path: Path) -> None:
    quiet_libraries()
    manifest = export_run(Run(tiny_run), tmp_path / "bundle", ExportOptions())
    for table in manifest.tables:
        counts = read_counts(tmp_path / "bundle" / "tables", table)
        assert counts is not None
        assert counts.ids == table.hot_ids  # so few ids are all in the hot list
        assert max(group.asked / group.ids for group in counts.groups) <= counts.requests


@pytest.mark.parametrize("limit", [0, 2, 9])
def test_the_hottest_come_first(limit: int) -> None:
    assert hottest(np.array([3, 0, 7, 3, 1]), limit).tolist() == [2, 0, 3, 4][:limit]
