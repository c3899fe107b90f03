"""FeatureSchema: where each feature sits in the inputs of a model. Shared by training, export and serving.

The model's inputs ("ModelInputs" in docs/architecture.md) are, with U requests and N candidates:

    user_pooled [U, ΣD]   item_pooled [N, ΣD]   user_dense [U, a]   item_dense [N, b]   user_index [N]
    and per sequence NAME [rows, T, D] and NAME.length [rows]
"""

from __future__ import annotations

from typing import Literal

import msgspec

from torchrank.features.spec import Pooling

Rows = Literal["user", "item"]


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pooled embedding: columns start … start + dim of `user_pooled` or `item_pooled`."""

    group: str
    feature: str
    table: str
    dim: int
    start: int
    pooling: Pooling


class SequenceSlot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sequence input: `name` float32 [rows, max_length, dim], right-padded with zeros, `name`.length int64 [rows]."""

    name: str
    group: str
    feature: str
    table: str
    dim: int
    max_length: int
    rows: Rows


class TableSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One embedding table and the features that read it (a feature appears once per group that asks for it)."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]


class EmbeddingGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model asks for: an embedding of `features` (None: all sparse ones), of `dim` (None: the spec's).

    The group named `deep` uses the features' own tables; any other group G has its own, named `G.TABLE`.
    """

    features: tuple[str, ...] | None = None
    dim: int | None = None


class FeatureSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    user_pooled: tuple[Slot, ...]
    item_pooled: tuple[Slot, ...]
    user_dense: tuple[str, ...]
    item_dense: tuple[str, ...]
    sequences: tuple[SequenceSlot, ...]
    tables: tuple[TableSpec, ...]
    tasks: tuple[str, ...]
