"""ModelInputs: the border between the sparse part (tables, ids) and the dense part (the model)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ModelInputs:
    """U requests, N candidates; columns as `FeatureSchema` says. A part without features has 0 columns.

    user_pooled float [U, ΣD], item_pooled float [N, ΣD], user_dense float [U, a], item_dense float [N, b],
    user_index int64 [N]; per sequence: sequences[NAME] float [rows, T, D], right-padded with zeros, and
    lengths[NAME] int64 [rows].
    """

    user_pooled: Tensor
    item_pooled: Tensor
    user_dense: Tensor
    item_dense: Tensor
    user_index: Tensor
    sequences: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Mapping[str, Tensor] = field(default_factory=dict)
