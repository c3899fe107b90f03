"""IdBatch and where rows lie, against loops over the tables."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_store.batch import IdBatch, batch_of, row_offsets, row_starts
from embedding_store.errors import UnknownTable
from embedding_store.release import ReleaseManifest, TableInfo

WIDTHS = np.array([4, 32, 7], np.int64)


def random_batch(rng: np.random.Generator) -> IdBatch:
    tables = rng.permutation(3)[: rng.integers(0, 4)].astype(np.int64)
    counts = rng.integers(0, 6, len(tables))
    return IdBatch(tables, counts, rng.integers(-5, 100, counts.sum()))


@pytest.mark.parametrize("seed", range(40))
def test_a_selection_keeps_every_id_with_its_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = random_batch(rng)
    positions = np.flatnonzero(rng.random(len(batch.ids)) < 0.4)
    table_of = np.repeat(batch.tables, batch.counts).tolist()
    chosen = batch.select(positions)
    assert np.repeat(chosen.tables, chosen.counts).tolist() == [table_of[position] for position in positions]
    np.testing.assert_array_equal(chosen.ids, batch.ids[positions])
    np.testing.assert_array_equal(chosen.tables, batch.tables)


@pytest.mark.parametrize("seed", range(20))
def test_rows_lie_one_after_another(seed: int) -> None:
    batch = random_batch(np.random.default_rng(seed))
    starts = row_starts(batch, WIDTHS)
    byte, expected = 0, []
    for table, count in zip(batch.tables, batch.counts, strict=True):
        for _ in range(count):
            expected.append(byte)
            byte += int(WIDTHS[table])
    assert starts[-1] == byte
    assert row_offsets(batch.tables, batch.counts, WIDTHS, starts).tolist() == expected


def test_ids_by_name_become_a_batch() -> None:
    infos = [TableInfo(name, 10, 1, "fp32", 4, 2046, "") for name in ("item", "user")]
    manifest = ReleaseManifest("demo", "1", "", tuple(infos))
    batch = batch_of(manifest, {"user": np.array([3, 1]), "item": np.empty(0, np.int64)})
    assert (batch.tables.tolist(), batch.counts.tolist(), batch.ids.tolist()) == ([1, 0], [2, 0], [3, 1])
    with pytest.raises(UnknownTable, match="release demo@1 has no table 'shop'; it has: item, user"):
        batch_of(manifest, {"shop": np.array([1])})
    with pytest.raises(ValueError, match=r"table 'item': ids must be int64 \[n\], not int32 \[1\]"):
        batch_of(manifest, {"item": np.array([1], np.int32)})  # type: ignore[dict-item]
