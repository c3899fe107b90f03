"""FeatureBatch: the output of the feature operators, the same in training and in serving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Ragged:
    """The ids of one sparse feature: row i has values[offsets[i] : offsets[i + 1]].

    values: int64 [nnz], each in 0 … table rows - 1; offsets: int64 [rows + 1]; weights: float32 [nnz] or None.
    """

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class SideBatch:
    """Features that share their rows. `dense` is float32 [rows, n], columns in the order of the spec's features."""

    rows: int
    sparse: Mapping[str, Ragged]
    dense: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """U requests and their N candidates.

    user: user and context features, U rows; item: item and cross features, N rows;
    user_index: int64 [N], non-decreasing, the request each candidate belongs to.
    """

    user: SideBatch
    item: SideBatch
    user_index: NDArray[np.int64]
