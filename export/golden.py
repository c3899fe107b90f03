"""Golden requests: raw rows out of the run's own data, and the scores that the trainer's modules give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torchrec import KeyedJaggedTensor

from export.bundle import Golden
from torchrank.data.columns import Columns
from torchrank.data.source import Source
from torchrank.data.torch_batch import Key, TorchBatch, lookup_keys, to_torch
from torchrank.features.batch import FeatureBatch
from torchrank.features.schema import FeatureSchema
from torchrank.features.spec import FeatureSpec
from torchrank.models.base import RankModel
from torchrank.training.embeddings import Embeddings
from torchrank.training.sharding import table_name


def golden_rows(source: Source, spec: FeatureSpec, request_column: str | None, rows: int) -> pa.RecordBatch:
    """The first `rows` rows of `source` (or all), with the columns that the features read."""
    types = {name: spec.columns[name].type for name in spec.used_columns()}
    keep = () if request_column is None else (request_column,)
    return next(iter(source.stream(Columns(types, keep=keep)))).slice(0, rows)


@dataclass
class NeededRows:
    """The rows of one table that the golden requests read. ids: int64 [n], ascending; rows: float32 [n, dim]."""

    ids: NDArray[np.int64]
    rows: NDArray[np.float32]

    def take(self, ids: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Keeps what it needs of these rows, float32 [n, dim], of the table's ids int64 [n]."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        needed = self.ids[places] == ids
        self.rows[places[needed]] = rows[needed]


class TrainerScorer:
    """The modules that training runs, over tables cut down to the rows that the golden requests read: what the
    trainer says, without its tables in memory."""

    def __init__(self, model: RankModel, schema: FeatureSchema, features: FeatureBatch) -> None:
        self._model = model.eval()
        self._schema = schema
        self._batch = to_torch(features, {}, schema)
        self._keys = lookup_keys(schema)
        self.needed = {table.name: self._needed(table.name, table.dim) for table in schema.tables}

    def scores(self) -> dict[str, NDArray[np.float32]]:
        """Probabilities float32 [N] per task. To be called when every `needed` has taken its rows."""
        tables = tuple(
            msgspec.structs.replace(table, rows=len(self.needed[table.name].ids)) for table in self._schema.tables
        )
        embeddings = Embeddings(msgspec.structs.replace(self._schema, tables=tables)).to_empty(device="cpu")
        names = {key: table_name(f"embeddings.{key}") for key in embeddings.state_dict()}
        embeddings.load_state_dict(
            {key: torch.from_numpy(self.needed[name].rows) for key, name in names.items() if name is not None}
        )
        with torch.no_grad():
            logits = self._model(embeddings(self._renumbered()))
        return {task: torch.sigmoid(logits[task].float()).numpy() for task in self._schema.tasks}

    def _needed(self, table: str, dim: int) -> NeededRows:
        read = [np.zeros(1, np.int64)]  # a table cannot be empty: one that no row reads keeps id 0
        for jagged, keys in zip((self._batch.pooled, self._batch.unpooled), self._keys, strict=True):
            for key, ids in _values(jagged, keys):
                if key.table == table:
                    read.append(ids)
        ids = np.unique(np.concatenate(read))
        return NeededRows(ids, np.zeros((len(ids), dim), np.float32))

    def _renumbered(self) -> TorchBatch:
        """Ids as positions in the cut-down tables."""

        def renumber(jagged: KeyedJaggedTensor | None, keys: Sequence[Key]) -> KeyedJaggedTensor | None:
            if jagged is None:
                return None
            values = [np.searchsorted(self.needed[key.table].ids, ids) for key, ids in _values(jagged, keys)]
            return KeyedJaggedTensor(jagged.keys(), torch.from_numpy(np.concatenate(values)), lengths=jagged.lengths())

        pooled, unpooled = self._keys
        return replace(
            self._batch,
            pooled=renumber(self._batch.pooled, pooled),
            unpooled=renumber(self._batch.unpooled, unpooled),
        )


def _values(jagged: KeyedJaggedTensor | None, keys: Sequence[Key]) -> list[tuple[Key, NDArray[np.int64]]]:
    if jagged is None:
        return []
    return list(zip(keys, np.split(jagged.values().numpy(), jagged.offset_per_key()[1:-1]), strict=True))


def golden_requests(
    rows: pa.RecordBatch, features: FeatureBatch, spec: FeatureSpec, scores: Mapping[str, NDArray[np.float32]]
) -> list[Golden]:
    """The rows as clients would send them, request by request as `features` has grouped them, with their scores."""
    raw = rows.select(spec.used_columns()).to_pylist()
    bounds = np.searchsorted(features.user_index, np.arange(features.user.rows + 1))
    requests = []
    for begin, end in pairwise(bounds):
        requests.append(
            Golden(
                user=_side(raw[begin], spec, "user"),
                context=_side(raw[begin], spec, "context"),
                candidates=[_side(row, spec, "item") for row in raw[begin:end]],
                scores={task: [float(score) for score in values[begin:end]] for task, values in scores.items()},
            )
        )
    return requests


def _side(row: Mapping[str, Any], spec: FeatureSpec, side: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if spec.columns[name].side == side}
