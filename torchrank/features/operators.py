"""The operators, compiled from their declarations: columns in, ids (Ragged) or a dense column out.

One implementation for training and serving; nothing here knows which of them calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from torchrank.features.batch import Ragged
from torchrank.features.columns import (
    NONE_MISSING,
    Floats,
    Ints,
    Lists,
    RawColumn,
    Scalars,
    Strings,
    column_from_values,
)
from torchrank.features.hashing import SEED, bucket, hash_bytes, hash_int64
from torchrank.features.ids import NO_ID, Ranges, mapper_for, whole
from torchrank.features.kernel import kernel
from torchrank.features.spec import Bucketize, Column, ColumnType, Combo, Id, LastK, Raw


class IdOperator:
    """`id`, `last_k` and `bucketize`: every value of a scalar or list column becomes an id, or none."""

    def __init__(self, feature: Id | LastK | Bucketize, columns: Mapping[str, Column]) -> None:
        self.name, self.column = feature.name, feature.inputs[0]
        kind = columns[self.column].type
        self.mapper = mapper_for(feature, "string" in kind)
        self.max_length = feature.max_length if isinstance(feature, LastK) else None
        self.missing_id = NO_ID
        if feature.default is not None:
            scalar = cast(ColumnType, kind.removeprefix("list<").removesuffix(">"))
            default = column_from_values([feature.default], scalar, lambda _: f"features.{feature.name}.default")
            assert not isinstance(default, Lists)
            ids = np.empty(1, dtype=np.int64)
            self.mapper(default, whole(1), NO_ID, ids)
            self.missing_id = int(ids[0])

    def __call__(self, column: RawColumn) -> Ragged:
        """Rows as in the column; the ids of a row in the order of its values."""
        if isinstance(column, Lists):
            return self._of_lists(column)
        return _without_no_ids(self._ids(column, whole(len(column))))

    def _ids(self, values: Scalars, ranges: Ranges) -> NDArray[np.int64]:
        ids = np.empty(len(values), dtype=np.int64)
        self.mapper(values, ranges, self.missing_id, ids)
        return ids

    def _of_lists(self, column: Lists) -> Ragged:
        starts, ends = column.offsets[:-1], column.offsets[1:]
        if self.max_length is None:
            ids = self._ids(column.elements, whole(len(column.elements)))
        else:
            starts = np.maximum(starts, ends - self.max_length)
            starts.flags.writeable = False
            ids = self._ids(column.elements, Ranges(starts, ends))
        values = np.empty(int((ends - starts).sum()) + int(column.missing.sum()), dtype=np.int64)
        offsets = np.empty(len(column) + 1, dtype=np.int64)
        kept = _gather_rows(ids, starts, ends, column.missing, self.missing_id, values, offsets)
        return Ragged(values[:kept], offsets)


def _without_no_ids(ids: NDArray[np.int64]) -> Ragged:
    """One row per id."""
    if ids.size == 0 or ids.min() >= 0:
        return Ragged(ids, np.arange(len(ids) + 1, dtype=np.int64))
    has_id = ids >= 0
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum(has_id, out=offsets[1:])
    return Ragged(ids[has_id], offsets)


@kernel
def _gather_rows(
    ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    missing: NDArray[np.bool_],
    missing_id: int,
    values: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> int:
    """The ids of each row's range one after another, without NO_ID; a missing row has the one missing_id."""
    n = 0
    offsets[0] = 0
    for r in range(len(starts)):
        if missing.size > 0 and missing[r]:
            if missing_id >= 0:
                values[n] = missing_id
                n += 1
        else:
            for i in range(starts[r], ends[r]):
                if ids[i] >= 0:
                    values[n] = ids[i]
                    n += 1
        offsets[r + 1] = n
    return n


class ComboOperator:
    """`combo`: one id per row from the chained hash of several scalar columns."""

    def __init__(self, feature: Combo) -> None:
        self.name, self.columns, self.buckets = feature.name, feature.inputs, feature.buckets

    def __call__(self, inputs: Sequence[tuple[RawColumn, NDArray[np.int64]]]) -> Ragged:
        """inputs: per column of the declaration, the column and which row of it each row reads (int64 [rows])."""
        rows = len(inputs[0][1])
        hashes = np.full(rows, SEED, dtype=np.uint64)
        for column, reads in inputs:
            if isinstance(column, Strings):
                _chain_strings(column.data, column.offsets, reads, hashes)
            else:
                assert isinstance(column, Ints)
                _chain_ints(column.values, column.missing, reads, hashes)
        ids = np.empty(rows, dtype=np.int64)
        _to_buckets(hashes, self.buckets, ids)
        return Ragged(ids, np.arange(rows + 1, dtype=np.int64))


@kernel
def _chain_strings(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], reads: NDArray[np.int64], hashes: NDArray[np.uint64]
) -> None:
    for r in range(len(reads)):
        i = reads[r]
        if offsets[i + 1] > offsets[i]:
            hashes[r] = hash_bytes(data, offsets[i], offsets[i + 1], hashes[r])


@kernel
def _chain_ints(
    values: NDArray[np.int64], missing: NDArray[np.bool_], reads: NDArray[np.int64], hashes: NDArray[np.uint64]
) -> None:
    for r in range(len(reads)):
        i = reads[r]
        if missing.size == 0 or not missing[i]:
            hashes[r] = hash_int64(values[i], hashes[r])


@kernel
def _to_buckets(hashes: NDArray[np.uint64], buckets: int, ids: NDArray[np.int64]) -> None:
    for r in range(len(hashes)):
        ids[r] = bucket(hashes[r], buckets)


class RawOperator:
    """`raw`: one dense float per row, computed in float64 and rounded once."""

    def __init__(self, feature: Raw) -> None:
        self.name, self.column, self.default, self.log1p = (
            feature.name,
            feature.inputs[0],
            feature.default,
            feature.log1p,
        )
        self.low, self.high = feature.clip if feature.clip is not None else (-math.inf, math.inf)
        self.shift, self.scale = 0.0, 1.0
        if feature.zscore is not None:
            self.shift, self.scale = feature.zscore
        elif feature.minmax is not None:
            self.shift, self.scale = feature.minmax[0], feature.minmax[1] - feature.minmax[0]

    def write(self, column: RawColumn, dense: NDArray[np.float32], at: int) -> int:
        """Fills dense[:, at]. Returns the first row whose result is not finite, -1 where all are."""
        assert isinstance(column, Floats | Ints)
        missing = column.missing if isinstance(column, Ints) else NONE_MISSING
        scaling = (self.default, self.low, self.high, self.log1p, self.shift, self.scale)
        return _raw(column.values, missing, *scaling, dense, at)


@kernel
def _raw(
    values: NDArray[np.float32] | NDArray[np.int64],
    missing: NDArray[np.bool_],
    default: float,
    low: float,
    high: float,
    log1p: bool,
    shift: float,
    scale: float,
    dense: NDArray[np.float32],
    at: int,
) -> int:
    for r in range(len(values)):
        x = float(values[r])
        if np.isnan(x) or (missing.size > 0 and missing[r]):
            x = default
        x = min(max(x, low), high)
        if log1p:
            x = math.copysign(math.log1p(abs(x)), x)
        dense[r, at] = np.float32((x - shift) / scale)
        if not np.isfinite(dense[r, at]):
            return r
    return -1
