"""A bundle of an untrained model and random tables, and what torch says to the same ids.

The reference pools by torch's own `embedding_bag` and pads by a loop. T steps of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor

from embedding_store.codec import encode, page_rows, row_bytes
from embedding_store.memory import MemoryStore
from embedding_store.release import ReleaseManifest, TableInfo
from export.bundle import Manifest, sha256, write_manifest
from export.graph import export_graph
from export.optimize import optimize
from tests.models.test_model_contract import COLUMNS, FEATURES, TWO
from tests.serving.bundle_factory import build_bundle
from torchrank.features.batch import FeatureBatch, Ragged, SideBatch
from torchrank.features.schema import FeatureSchema, SequenceSlot, Slot
from torchrank.models import ModelInputs, RankModel
from torchrank.training.config import Config, DataConfig
from torchrank.training.module import build_model, feature_schema

LENGTHS = ("none", "any", "limit")  # of the sequences of a batch


@dataclass
class TorchBundle:
    """`tables`: float32 [rows, dim]."""

    folder: Path
    manifest: Manifest
    model: RankModel
    tables: dict[str, NDArray[np.float32]]
    store: MemoryStore

    @property
    def schema(self) -> FeatureSchema:
        return self.manifest.schema

    def batch(self, users: int, candidates: int, lengths: str, seed: int) -> FeatureBatch:
        """Random ids; a user may have no candidate, and a pooled feature no id."""
        print(f"seed {seed}")
        rng = np.random.default_rng(seed)
        schema = self.schema
        rows = {table.name: table.rows for table in schema.tables}

        def ids(table: str, counts: NDArray[np.int64]) -> Ragged:
            offsets = np.concatenate(([0], np.cumsum(counts)))
            return Ragged(rng.integers(0, rows[table], offsets[-1]), offsets)

        def side(name: str, count: int, slots: tuple[Slot, ...], dense: int) -> SideBatch:
            sparse = {slot.feature: ids(slot.table, rng.integers(0, 3, count)) for slot in slots}
            for sequence in (sequence for sequence in schema.sequences if sequence.rows == name):
                least, most = {"none": (0, 0), "any": (0, sequence.max_length)}.get(lengths, (sequence.max_length,) * 2)
                sparse[sequence.feature] = ids(sequence.table, rng.integers(least, most + 1, count))
            return SideBatch(count, sparse, rng.normal(size=(count, dense)).astype(np.float32))

        return FeatureBatch(
            side("user", users, schema.user_pooled, len(schema.user_dense)),
            side("item", candidates, schema.item_pooled, len(schema.item_dense)),
            np.sort(rng.integers(0, users, candidates)),
        )

    def inputs(self, batch: FeatureBatch) -> ModelInputs:
        sides = {"user": batch.user, "item": batch.item}
        sequences = self.schema.sequences
        return ModelInputs(
            user_pooled=self._pooled(batch.user, self.schema.user_pooled),
            item_pooled=self._pooled(batch.item, self.schema.item_pooled),
            user_dense=torch.from_numpy(batch.user.dense),
            item_dense=torch.from_numpy(batch.item.dense),
            user_index=torch.from_numpy(batch.user_index),
            sequences={slot.name: self._padded(sides[slot.rows], slot) for slot in sequences},
            lengths={slot.name: torch.from_numpy(sides[slot.rows].sparse[slot.feature].lengths) for slot in sequences},
        )

    def expected(self, inputs: ModelInputs) -> dict[str, NDArray[np.float32]]:
        with torch.no_grad():
            return {task: torch.sigmoid(logits).numpy() for task, logits in self.model(inputs).items()}

    def _pooled(self, side: SideBatch, slots: tuple[Slot, ...]) -> Tensor:
        columns = []
        for slot in slots:
            ids, table = side.sparse[slot.feature], torch.from_numpy(self.tables[slot.table])
            values, starts = torch.from_numpy(ids.values), torch.from_numpy(ids.offsets[:-1])
            columns.append(F.embedding_bag(values, table, starts, mode=slot.pooling))
        return torch.cat(columns, dim=1)

    def _padded(self, side: SideBatch, slot: SequenceSlot) -> Tensor:
        ids = side.sparse[slot.feature]
        out = torch.zeros(side.rows, slot.max_length, slot.dim)
        for row in range(side.rows):
            for step, position in enumerate(range(ids.offsets[row], ids.offsets[row + 1])):
                out[row, step] = torch.from_numpy(self.tables[slot.table][ids.values[position]])
        return out


def torch_bundle(folder: Path, model_yaml: Path, **overrides: Any) -> TorchBundle:
    """Written to `folder`, which must not exist: the exporter's graph as variant `fp32`, the same after our passes as
    `optimised`. The tables are in its store alone."""
    data = DataConfig(
        name="hand-made", path="", train={}, labels=list(TWO),
        features={
            "embedding_dim": 8, "columns": dict(COLUMNS),
            "features": [{"name": name, "inputs": [name], **feature} for name, feature in FEATURES.items()],
        },
    )  # fmt: skip
    options: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(model_yaml))  # type: ignore[assignment]
    config = Config(model={**options, **overrides}, data=data, seed=3)
    spec, schema = feature_schema(config)
    model = build_model(config, schema).eval()
    tiny = build_bundle(folder).manifest  # for what a manifest has beside the model
    (folder / tiny.variant("fp16").file).unlink()
    export_graph(model, schema, folder / "model.onnx")
    onnx.save(optimize(onnx.load(folder / "model.onnx"))[0], folder / "model.optimised.onnx")
    variants = tuple(
        msgspec.structs.replace(
            tiny.variant("fp32"),
            name=name,
            file=file,
            sha256=sha256(folder / file),
            bytes=(folder / file).stat().st_size,
        )
        for name, file in (("fp32", "model.onnx"), ("optimised", "model.optimised.onnx"))
    )
    rng = np.random.default_rng(5)
    tables = {t.name: rng.normal(size=(t.rows, t.dim)).astype(np.float32) for t in schema.tables}
    infos = tuple(
        TableInfo(name, *rows.shape, "fp32", row_bytes("fp32", rows.shape[1]),
                  page_rows(row_bytes("fp32", rows.shape[1])), "")
        for name, rows in tables.items()
    )  # fmt: skip
    manifest = msgspec.structs.replace(tiny, features=spec, schema=schema, tables=infos, variants=variants)
    write_manifest(folder, manifest)
    store = MemoryStore()
    release = ReleaseManifest(manifest.model, manifest.version, manifest.created, infos)
    store.add(release, {name: encode("fp32", rows) for name, rows in tables.items()})
    return TorchBundle(folder, manifest, model, tables, store)
