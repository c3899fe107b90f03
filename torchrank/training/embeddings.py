"""The sparse part of a model: ids in, ModelInputs out, by TorchRec's embedding collections."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    PoolingType,
)

from torchrank.data.torch_batch import Key, TorchBatch, key_name, lookup_keys
from torchrank.features.schema import FeatureSchema, Slot
from torchrank.nn.inputs import ModelInputs


class ReplicatedEmbeddingCollection(EmbeddingCollection):
    """Left alone by TorchRec's sharders, which go by the exact class: an ordinary module with a copy on every rank.

    Fbgemm's CPU kernel for data-parallel tables pools whatever it is given, so unpooled ones stay with torch.
    """


class Embeddings(nn.Module):
    """Pooled tables in an EmbeddingBagCollection, those that `lookup_keys` says in one EmbeddingCollection per dim,
    because TorchRec's have one each.

    The tables are on the meta device: sharding makes the real ones (`torchrank/training/sharding.py`). `replicated`
    names unpooled tables that are not to be sharded; they are on the CPU.
    """

    def __init__(self, schema: FeatureSchema, replicated: Collection[str] = ()) -> None:
        super().__init__()
        self.schema = schema
        pooled, unpooled = lookup_keys(schema)
        copied = [key for key in unpooled if key.table in replicated]
        unpooled = [key for key in unpooled if key.table not in replicated]
        mean = {slot.table for slot in (*schema.user_pooled, *schema.item_pooled) if slot.pooling == "mean"}
        meta = torch.device("meta")
        self.pooled = None
        if pooled:
            self.pooled = EmbeddingBagCollection(device=meta, tables=_bag_configs(schema, pooled, mean))
        self.unpooled, self.replicated = nn.ModuleDict(), nn.ModuleDict()
        for dim, configs in _by_dim(_configs(schema, unpooled)).items():
            self.unpooled[f"dim{dim}"] = EmbeddingCollection(device=meta, tables=configs)
        for dim, configs in _by_dim(_configs(schema, copied)).items():
            self.replicated[f"dim{dim}"] = ReplicatedEmbeddingCollection(tables=configs)

    def forward(self, batch: TorchBatch) -> ModelInputs:
        bags: Mapping[str, Tensor] = self.pooled(batch.pooled).to_dict() if self.pooled is not None else {}
        rows: dict[str, JaggedTensor] = {}
        for collection in (*self.unpooled.values(), *self.replicated.values()):
            rows.update(collection(batch.unpooled).items())

        def concatenate(slots: Sequence[Slot], count: int) -> Tensor:
            if not slots:
                return batch.user_dense.new_zeros(count, 0)
            parts = (bags[key] if (key := key_name(slot)) in bags else _pool(rows[key], slot.pooling) for slot in slots)
            return torch.cat([part[:count] for part in parts], dim=1)

        sequences, lengths = {}, {}
        for slot in self.schema.sequences:
            jagged = rows[key_name(slot)]
            count = batch.users if slot.rows == "user" else batch.rows
            sequences[slot.name] = jagged.to_padded_dense(slot.max_length)[:count]
            lengths[slot.name] = jagged.lengths()[:count]
        return ModelInputs(
            user_pooled=concatenate(self.schema.user_pooled, batch.users),
            item_pooled=concatenate(self.schema.item_pooled, batch.rows),
            user_dense=batch.user_dense,
            item_dense=batch.item_dense,
            user_index=batch.user_index,
            sequences=sequences,
            lengths=lengths,
        )


def module_name(table: str) -> str:
    """The table's name inside TorchRec, which makes it the key of a ModuleDict: those take neither a dot, as in the
    tables of a second embedding group, nor the name of a method, as a feature `type` or `items` would be."""
    return "table/" + table.replace(".", "/")


def table_of(module_name: str) -> str:
    """The inverse of `module_name`: a table's own name has no slash."""
    return module_name.removeprefix("table/").replace("/", ".")


def _configs(schema: FeatureSchema, keys: Sequence[Key]) -> list[EmbeddingConfig]:
    return [
        EmbeddingConfig(
            name=module_name(table.name),
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            feature_names=_names(keys, table.name),
        )
        for table in schema.tables
        if _names(keys, table.name)
    ]


def _by_dim(configs: Sequence[EmbeddingConfig]) -> dict[int, list[EmbeddingConfig]]:
    return {dim: [c for c in configs if c.embedding_dim == dim] for dim in {c.embedding_dim: None for c in configs}}


def _bag_configs(schema: FeatureSchema, keys: Sequence[Key], mean: set[str]) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=config.name,
            num_embeddings=config.num_embeddings,
            embedding_dim=config.embedding_dim,
            feature_names=config.feature_names,
            pooling=PoolingType.MEAN if table_of(config.name) in mean else PoolingType.SUM,
        )
        for config in _configs(schema, keys)
    ]


def _names(keys: Sequence[Key], table: str) -> list[str]:
    return [key.name for key in keys if key.table == table]


def _pool(jagged: JaggedTensor, pooling: str) -> Tensor:
    """float [rows, D]: sum or mean of each row's embeddings, zeros for an empty row."""
    lengths = jagged.lengths()
    pooled = torch.segment_reduce(jagged.values(), "sum", lengths=lengths, axis=0, initial=0)
    return pooled / lengths.clamp(min=1).unsqueeze(1) if pooling == "mean" else pooled
