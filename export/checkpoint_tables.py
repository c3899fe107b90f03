"""Embedding tables out of a distributed checkpoint, in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from torchrank.training.sharding import table_name

_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class CheckpointTable:
    """`rows` × `dim` float32, saved in shards under `key`."""

    name: str
    key: str
    rows: int
    dim: int


class CheckpointTables:
    """The tables of one checkpoint, without building the module that wrote them."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        self.tables: Mapping[str, CheckpointTable] = {
            table.name: table for key in self._metadata if (table := self._table(key)) is not None
        }

    def chunks(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The rows 0, 1, … of table `name`, float32 [n, dim] at a time.

        One shard's rows are in memory at a time: a checkpoint stores a shard as one piece. (Of a column-wise sharded
        table, whose shards all have all rows, that is the whole table, once.)
        """
        table = self.tables[name]
        for start, stop in self._row_ranges(table):
            rows = self._read(table, start, stop)
            for first in range(0, len(rows), _CHUNK_ROWS):
                yield rows[first : first + _CHUNK_ROWS]

    def _row_ranges(self, table: CheckpointTable) -> list[tuple[int, int]]:
        metadata = self._metadata[table.key]
        assert isinstance(metadata, TensorStorageMetadata)
        ranges = {(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in metadata.chunks}
        return sorted((start, stop) for start, stop in ranges if stop > start)

    def _read(self, table: CheckpointTable, start: int, stop: int) -> NDArray[np.float32]:
        target = torch.empty(stop - start, table.dim)
        planner = _RowRange(table, start, target)
        dcp.load({table.key: target}, checkpoint_id=self._checkpoint, planner=planner, no_dist=True)
        rows: NDArray[np.float32] = target.numpy()
        return rows

    def _table(self, key: str) -> CheckpointTable | None:
        name = table_name(key)
        if name is None or not key.startswith("model."):
            return None
        metadata = self._metadata[key]
        assert isinstance(metadata, TensorStorageMetadata)
        return CheckpointTable(name, key, *metadata.size)


class _RowRange(DefaultLoadPlanner):
    """Reads rows start … start + len(target) of one saved tensor into `target`."""

    def __init__(self, table: CheckpointTable, start: int, target: torch.Tensor) -> None:
        super().__init__()
        self._table = table
        self._start = start
        self._target = target

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata[self._table.key]
        assert isinstance(saved, TensorStorageMetadata)
        wanted = ChunkStorageMetadata(torch.Size([self._start, 0]), self._target.shape)
        return LoadPlan(create_read_items_for_chunk_list(self._table.key, saved, [wanted]))

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The rows' place, whatever their offset in the table: the default looks for a sharded tensor."""
        return self._target


def load_dense(checkpoint: Path, model: torch.nn.Module) -> None:
    """The dense parameters of the checkpoint into `model`. Raises ValueError where they do not fit."""
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {f"model.model.{key}": value for key, value in model.state_dict().items()}
    for key, value in state.items():
        found = saved.get(key)
        if not isinstance(found, TensorStorageMetadata) or found.size != value.shape:
            there = "not there" if found is None else f"{tuple(getattr(found, 'size', ()))} there"
            raise ValueError(
                f"checkpoint {checkpoint} is of another configuration: {key} is {tuple(value.shape)} here and {there}"
            )
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
