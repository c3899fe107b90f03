"""From values to ids of an embedding table: hash buckets, the value itself, a vocabulary, boundaries.

A mapper writes `ids`, int64 [elements], for the elements of the given ranges only: a long history is not hashed for
the sake of its last ten. Unknown and missing values get the ids chosen for them; NO_ID leaves a value out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from torchrank.features.columns import NONE_MISSING, Floats, Ints, Scalars, Strings, column_from_values, frozen
from torchrank.features.hashing import SEED, bucket, hash_bytes, hash_int64
from torchrank.features.kernel import kernel
from torchrank.features.spec import Bucketize, Id, LastK

NO_ID = -1


@dataclass(frozen=True, slots=True)
class Ranges:
    """Elements starts[r] … ends[r] of each r; both int64 [ranges]."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


@lru_cache(maxsize=256)  # a request needs it once per feature, and always for the same few sizes
def whole(elements: int) -> Ranges:
    """The one range that is all elements."""
    return Ranges(frozen(np.zeros(1, dtype=np.int64)), frozen(np.array([elements], dtype=np.int64)))


class IdMapper(Protocol):
    def __call__(self, values: Scalars, ranges: Ranges, missing_id: int, ids: NDArray[np.int64]) -> None: ...


def mapper_for(feature: Id | LastK | Bucketize, is_string: bool) -> IdMapper:
    """The mapper of a checked feature over a column (or list column) of strings, else of numbers."""
    if isinstance(feature, Bucketize):
        return Boundaries(feature)
    if feature.buckets is not None:
        return StringBuckets(feature.buckets) if is_string else IntBuckets(feature.buckets)
    unknown_id = feature.known if feature.oov == "row" else NO_ID
    if feature.vocabulary is None:
        return IntRange(feature.known, unknown_id)
    return StringVocabulary(feature, unknown_id) if is_string else IntVocabulary(feature, unknown_id)


class StringBuckets:
    def __init__(self, buckets: int) -> None:
        self.buckets = buckets

    def __call__(self, values: Scalars, ranges: Ranges, missing_id: int, ids: NDArray[np.int64]) -> None:
        assert isinstance(values, Strings)
        _string_buckets(values.data, values.offsets, ranges.starts, ranges.ends, self.buckets, missing_id, ids)


@kernel
def _string_buckets(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    buckets: int,
    missing_id: int,
    ids: NDArray[np.int64],
) -> None:
    for r in range(len(starts)):
        for i in range(starts[r], ends[r]):
            if offsets[i + 1] == offsets[i]:
                ids[i] = missing_id
            else:
                ids[i] = bucket(hash_bytes(data, offsets[i], offsets[i + 1], SEED), buckets)


class IntBuckets:
    def __init__(self, buckets: int) -> None:
        self.buckets = buckets

    def __call__(self, values: Scalars, ranges: Ranges, missing_id: int, ids: NDArray[np.int64]) -> None:
        assert isinstance(values, Ints)
        _int_buckets(values.values, values.missing, ranges.starts, ranges.ends, self.buckets, missing_id, ids)


@kernel
def _int_buckets(
    values: NDArray[np.int64],
    missing: NDArray[np.bool_],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    buckets: int,
    missing_id: int,
    ids: NDArray[np.int64],
) -> None:
    for r in range(len(starts)):
        for i in range(starts[r], ends[r]):
            if missing.size > 0 and missing[i]:
                ids[i] = missing_id
            else:
                ids[i] = bucket(hash_int64(values[i], SEED), buckets)


class IntRange:
    """The value is the id, where it is one of 0 … size - 1."""

    def __init__(self, size: int, unknown_id: int) -> None:
        self.size, self.unknown_id = size, unknown_id

    def __call__(self, values: Scalars, ranges: Ranges, missing_id: int, ids: NDArray[np.int64]) -> None:
        assert isinstance(values, Ints)
        _int_range(
            values.values, values.missing, ranges.starts, ranges.ends, self.size, self.unknown_id, missing_id, ids
        )


@kernel
def _int_range(
    values: NDArray[np.int64],
    missing: NDArray[np.bool_],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    size: int,
    unknown_id: int,
    missing_id: int,
    ids: NDArray[np.int64],
) -> None:
    for r in range(len(starts)):
        for i in range(starts[r], ends[r]):
            if missing.size > 0 and missing[i]:
                ids[i] = missing_id
            else:
                ids[i] = values[i] if 0 <= values[i] < size else unknown_id


class IntVocabulary:
    """By binary search in the sorted vocabulary."""

    def __init__(self, feature: Id | LastK, unknown_id: int) -> None:
        words = np.array(feature.vocabulary, dtype=np.int64)
        order = np.argsort(words)
        self.words, self.positions, self.unknown_id = words[order], order.astype(np.int64), unknown_id

    def __call__(self, values: Scalars, ranges: Ranges, missing_id: int, ids: NDArray[np.int64]) -> None:
        assert isinstance(values, Ints)
        tables = (self.words, self.positions)
        _int_vocabulary(
            values.values, values.missing, ranges.starts, ranges.ends, *tables, self.unknown_id, missing_id, ids
        )


@kernel
def _int_vocabulary(
    values: NDArray[np.int64],
    missing: NDArray[np.bool_],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    words: NDArray[np.int64],
    positions: NDArray[np.int64],
    unknown_id: int,
    missing_id: int,
    ids: NDArray[np.int64],
) -> None:
    for r in range(len(starts)):
        for i in range(starts[r], ends[r]):
            if missing.size > 0 and missing[i]:
                ids[i] = missing_id
            else:
                at = np.searchsorted(words, values[i])
                ids[i] = positions[at] if at < len(words) and words[at] == values[i] else unknown_id


class StringVocabulary:
    """By an open-addressing table of hashes, at most half full, that points into the words themselves."""

    def __init__(self, feature: Id | LastK, unknown_id: int) -> None:
        assert feature.vocabulary is not None
        words = column_from_values(feature.vocabulary, "string", lambda row: f"{feature.name}.vocabulary[{row}]")
        assert isinstance(words, Strings)
        self.words, self.unknown_id = words, unknown_id
        self.slots = np.full(1 << (2 * len(words) - 1).bit_length(), NO_ID, dtype=np.int64)
        _fill_slots(words.data, words.offsets, self.slots)

    def __call__(self, values: Scalars, ranges: Ranges, missing_id: int, ids: NDArray[np.int64]) -> None:
        assert isinstance(values, Strings)
        words = (self.words.data, self.words.offsets, self.slots)
        _string_vocabulary(
            values.data, values.offsets, ranges.starts, ranges.ends, *words, self.unknown_id, missing_id, ids
        )


@kernel
def _fill_slots(data: NDArray[np.uint8], offsets: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
    for word in range(len(offsets) - 1):
        at = bucket(hash_bytes(data, offsets[word], offsets[word + 1], SEED), len(slots))
        while slots[at] >= 0:
            at = (at + 1) % len(slots)
        slots[at] = word


@kernel
def _same(a: NDArray[np.uint8], a_start: int, a_end: int, b: NDArray[np.uint8], b_start: int, b_end: int) -> bool:
    if a_end - a_start != b_end - b_start:
        return False
    for i in range(a_end - a_start):  # noqa: SIM110 (a numba loop)
        if a[a_start + i] != b[b_start + i]:
            return False
    return True


@kernel
def _string_vocabulary(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    words: NDArray[np.uint8],
    word_offsets: NDArray[np.int64],
    slots: NDArray[np.int64],
    unknown_id: int,
    missing_id: int,
    ids: NDArray[np.int64],
) -> None:
    for r in range(len(starts)):
        for i in range(starts[r], ends[r]):
            start, end = offsets[i], offsets[i + 1]
            if start == end:
                ids[i] = missing_id
                continue
            at = bucket(hash_bytes(data, start, end, SEED), len(slots))
            word = slots[at]
            while word >= 0 and not _same(data, start, end, words, word_offsets[word], word_offsets[word + 1]):
                at = (at + 1) % len(slots)
                word = slots[at]
            ids[i] = word if word >= 0 else unknown_id


class Boundaries:
    """id = how many boundaries are ≤ the value."""

    def __init__(self, feature: Bucketize) -> None:
        self.exact = np.array(feature.boundaries, dtype=np.float64)
        self.rounded = self.exact.astype(np.float32).astype(np.float64)

    def __call__(self, values: Scalars, ranges: Ranges, missing_id: int, ids: NDArray[np.int64]) -> None:
        if isinstance(values, Floats):
            _boundaries(values.values, NONE_MISSING, ranges.starts, ranges.ends, self.rounded, missing_id, ids)
        else:
            assert isinstance(values, Ints)
            _boundaries(values.values, values.missing, ranges.starts, ranges.ends, self.exact, missing_id, ids)


@kernel
def _boundaries(
    values: NDArray[np.float32] | NDArray[np.int64],
    missing: NDArray[np.bool_],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    boundaries: NDArray[np.float64],
    missing_id: int,
    ids: NDArray[np.int64],
) -> None:
    for r in range(len(starts)):
        for i in range(starts[r], ends[r]):
            value = np.float64(values[i])
            if np.isnan(value) or (missing.size > 0 and missing[i]):
                ids[i] = missing_id
            else:
                ids[i] = np.searchsorted(boundaries, value, side="right")
