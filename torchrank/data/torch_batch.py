"""The one conversion from FeatureBatch to TorchRec's KeyedJaggedTensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

from torchrank.features.batch import FeatureBatch
from torchrank.features.schema import FeatureSchema, Rows, SequenceSlot, Slot

USER: Rows = "user"
ITEM: Rows = "item"


@dataclass(frozen=True)
class Key:
    """One key of a KeyedJaggedTensor: `feature` read from `table` for one embedding group."""

    name: str
    feature: str
    table: str
    rows: Rows


def lookup_keys(schema: FeatureSchema) -> tuple[list[Key], list[Key]]:
    """The keys of the pooled and of the unpooled collection, in the order of their KeyedJaggedTensors.

    A table that any sequence reads is in the unpooled one with all of its features, so that a candidate and the
    history it is compared with share their rows. So is a table read with two poolings: TorchRec has one per table.
    """
    pooled_slots = (*schema.user_pooled, *schema.item_pooled)
    unpooled_tables = {slot.table for slot in schema.sequences}
    pooling: dict[str, str] = {}
    for slot in pooled_slots:
        if pooling.setdefault(slot.table, slot.pooling) != slot.pooling:
            unpooled_tables.add(slot.table)
    keys = [
        Key(key_name(slot), slot.feature, slot.table, rows)
        for slots, rows in ((schema.user_pooled, USER), (schema.item_pooled, ITEM))
        for slot in slots
    ]
    keys += [Key(key_name(slot), slot.feature, slot.table, slot.rows) for slot in schema.sequences]
    pooled = [key for key in keys if key.table not in unpooled_tables]
    return pooled, [key for key in keys if key.table in unpooled_tables]


def key_name(slot: Slot | SequenceSlot) -> str:
    return f"{slot.group}/{slot.feature}"


@dataclass(frozen=True)
class TorchBatch:
    """U requests with N candidates.

    Both KeyedJaggedTensors have the same number of rows for all keys, at least N: user keys use the first U, item keys
    the first N, and the rest is empty, which costs nothing and lets a table serve both sides. labels float32
    [N, tasks]; weight: 0.0 makes the batch count for nothing (a rank that ran out of data still takes part in a step).
    """

    pooled: KeyedJaggedTensor | None
    unpooled: KeyedJaggedTensor | None
    users: int
    user_dense: Tensor
    item_dense: Tensor
    user_index: Tensor
    labels: Tensor
    weight: float = 1.0

    @property
    def rows(self) -> int:
        return self.user_index.shape[0]

    def without_weight(self) -> TorchBatch:
        return replace(self, weight=0.0)

    def to(self, device: torch.device) -> TorchBatch:
        return replace(
            self,
            pooled=self.pooled.to(device) if self.pooled is not None else None,
            unpooled=self.unpooled.to(device) if self.unpooled is not None else None,
            user_dense=self.user_dense.to(device),
            item_dense=self.item_dense.to(device),
            user_index=self.user_index.to(device),
            labels=self.labels.to(device),
        )


def to_torch(
    features: FeatureBatch, labels: Mapping[str, NDArray[np.float32]], schema: FeatureSchema, rows: int | None = None
) -> TorchBatch:
    """Shares memory with `features` where it can. labels: float32 [N] per task of the schema, or none at all.

    rows: of the KeyedJaggedTensors, N where None. Ranks that look up together need the same: TorchRec's row-wise bags
    exchange blocks of equal size, and the last batch of a pass may have a row more on one rank than on another.
    """
    rows = features.item.rows if rows is None else rows
    pooled, unpooled = lookup_keys(schema)
    columns = [labels[task] for task in schema.tasks if task in labels]
    return TorchBatch(
        pooled=_keyed_jagged(features, pooled, rows),
        unpooled=_keyed_jagged(features, unpooled, rows),
        users=features.user.rows,
        user_dense=torch.from_numpy(features.user.dense),
        item_dense=torch.from_numpy(features.item.dense),
        user_index=torch.from_numpy(features.user_index),
        labels=torch.from_numpy(np.stack(columns, axis=1)) if columns else torch.zeros(features.item.rows, 0),
    )


def _keyed_jagged(features: FeatureBatch, keys: Sequence[Key], rows: int) -> KeyedJaggedTensor | None:
    if not keys:
        return None
    lengths = np.zeros((len(keys), rows), np.int64)
    values = []
    for row, key in zip(lengths, keys, strict=True):
        side = features.user if key.rows == "user" else features.item
        ids = side.sparse[key.feature]
        assert ids.weights is None, f"feature {key.feature}: the collections are built without weights"
        row[: side.rows] = ids.lengths
        values.append(ids.values)
    return KeyedJaggedTensor(
        keys=[key.name for key in keys],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(lengths.reshape(-1)),
    )
