"""Embedding tables out of a distributed checkpoint, in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from torchrank.training.sharding import table_name

_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class CheckpointTable:
    """`rows` × `dim` float32, saved in shards under `key`."""

    name: str
    key: str
    rows: int
    dim: int


@dataclass(frozen=True)
class _Shard:
    """A part of a table, mapped into memory: `values` float32 [rows, columns]."""

    first_row: int
    first_column: int
    values: NDArray[np.float32]

    def copy_into(self, target: NDArray[np.float32], first_row: int) -> None:
        """What it has of the rows first_row, first_row + 1, … that `target` is for."""
        begin = max(self.first_row, first_row)
        end = min(self.first_row + len(self.values), first_row + len(target))
        if begin < end:
            columns = slice(self.first_column, self.first_column + self.values.shape[1])
            part = self.values[begin - self.first_row : end - self.first_row]
            target[begin - first_row : end - first_row, columns] = part


class CheckpointTables:
    """The tables of one checkpoint, without building the module that wrote them."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._metadata = FileSystemReader(checkpoint).read_metadata()
        self.tables: Mapping[str, CheckpointTable] = {
            table.name: table for key in self._metadata.state_dict_metadata if (table := self._table(key)) is not None
        }

    def chunks(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The rows 0, 1, … of table `name`, float32 [n, dim] at a time, however it is sharded.

        One chunk is in memory at a time: torch would load a shard whole, and then copy it, so shards are mapped.
        """
        table = self.tables[name]
        shards = self._shards(table)
        assert sum(shard.values.size for shard in shards) == table.rows * table.dim  # each value once
        for first_row in range(0, table.rows, _CHUNK_ROWS):
            rows = np.empty((min(_CHUNK_ROWS, table.rows - first_row), table.dim), np.float32)
            for shard in shards:
                shard.copy_into(rows, first_row)
            yield rows

    def _shards(self, table: CheckpointTable) -> list[_Shard]:
        return [
            _Shard(index.offset[0], index.offset[1], self._map(index))
            for index in self._metadata.storage_data
            if index.fqn == table.key and index.offset is not None
        ]

    def _map(self, index: MetadataIndex) -> NDArray[np.float32]:
        """The shard where torch.save wrote it, which a tensor without memory tells."""
        stored = self._metadata.storage_data[index]
        path = self._checkpoint / stored.relative_path
        with path.open("rb") as file, FakeTensorMode():
            view = cast(IO[bytes], _create_file_view(file, stored.offset, stored.length))
            shard: torch.Tensor = torch.load(view, weights_only=True)
        assert shard.dtype == torch.float32
        assert shard.is_contiguous()
        if not shard.numel():
            return np.empty(tuple(shard.shape), np.float32)
        start = stored.offset + shard.untyped_storage()._checkpoint_offset + 4 * shard.storage_offset()
        return np.memmap(path, "<f4", "r", start, tuple(shard.shape))

    def _table(self, key: str) -> CheckpointTable | None:
        name = table_name(key)
        if name is None or not key.startswith("model."):
            return None
        metadata = self._metadata.state_dict_metadata[key]
        assert isinstance(metadata, TensorStorageMetadata)
        return CheckpointTable(name, key, *metadata.size)


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
