"""Embedding tables out of a distributed checkpoint, in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

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
_DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.int64: np.dtype("<i8")}


@dataclass(frozen=True)
class CheckpointTable:
    """`rows` × `dim` float32, saved in shards under `key`; under `ids_key` int64 [rows], the raw id of each row.

    Without `ids_key` the rows are those of the ids 0, 1, …
    """

    name: str
    key: str
    rows: int
    dim: int
    ids_key: str | None = None


@dataclass(frozen=True)
class _Shard:
    """A part of a tensor, mapped into memory: `values` [rows, columns]."""

    first_row: int
    first_column: int
    values: NDArray[Any]

    def copy_into(self, target: NDArray[Any], first_row: int) -> None:
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
        return self._chunks(table.key, (table.rows, table.dim))

    def raw_ids(self, name: str) -> Iterator[NDArray[np.int64]]:
        """The ids of the rows that `chunks` gives, int64 [n] at a time; of tables that have an `ids_key`."""
        table = self.tables[name]
        assert table.ids_key is not None
        for ids in self._chunks(table.ids_key, (table.rows, 1)):
            yield ids[:, 0]

    def _chunks(self, key: str, shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
        shards = [
            _Shard(index.offset[0], sum(index.offset[1:]), self._map(index))
            for index in self._metadata.storage_data
            if index.fqn == key and index.offset is not None
        ]
        rows, columns = shape
        assert sum(shard.values.size for shard in shards) == rows * columns  # each value once
        for first_row in range(0, rows, _CHUNK_ROWS):
            chunk = np.empty((min(_CHUNK_ROWS, rows - first_row), columns), shards[0].values.dtype)
            for shard in shards:
                shard.copy_into(chunk, first_row)
            yield chunk

    def _map(self, index: MetadataIndex) -> NDArray[Any]:
        """The shard where torch.save wrote it, which a tensor without memory tells: [rows, columns]."""
        stored = self._metadata.storage_data[index]
        path = self._checkpoint / stored.relative_path
        with path.open("rb") as file, FakeTensorMode():
            view = cast(IO[bytes], _create_file_view(file, stored.offset, stored.length))
            shard: torch.Tensor = torch.load(view, weights_only=True)
        assert shard.is_contiguous()
        shape = (len(shard), shard[:1].numel())
        if not shard.numel():
            return np.empty(shape, _DTYPES[shard.dtype])
        offset = shard.element_size() * shard.storage_offset()
        start = stored.offset + shard.untyped_storage()._checkpoint_offset + offset
        return np.memmap(path, _DTYPES[shard.dtype], "r", start, shape)

    def _table(self, key: str) -> CheckpointTable | None:
        name = table_name(key)
        if name is None or not key.startswith("model."):
            return None
        metadata = self._metadata.state_dict_metadata[key]
        assert isinstance(metadata, TensorStorageMetadata)
        rows, dim = metadata.size
        return CheckpointTable(name, key, rows, dim, self._ids_key(name, key, rows))

    def _ids_key(self, name: str, key: str, rows: int) -> str | None:
        """`….weight` -> `….ids`, where the checkpoint has it."""
        ids_key = f"{key.removesuffix('.weight')}.ids"
        found = self._metadata.state_dict_metadata.get(ids_key)
        if found is None:
            return None
        assert isinstance(found, TensorStorageMetadata)
        if found.size != torch.Size([rows]) or found.properties.dtype != torch.int64:
            raise ValueError(
                f"checkpoint {self._checkpoint}: the ids of table {name!r} are {found.properties.dtype} "
                f"{list(found.size)}; expected torch.int64 [{rows}], one for each row"
            )
        return ids_key


def load_dense(checkpoint: Path, model: torch.nn.Module) -> None:
    """The dense parameters of the checkpoint into `model`. Raises ValueError where they are not the same ones."""
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {f"model.model.{key}": value for key, value in model.state_dict().items()}
    for key, value in state.items():
        found = saved.get(key)
        if not isinstance(found, TensorStorageMetadata) or found.size != value.shape:
            there = "not there" if found is None else f"{tuple(getattr(found, 'size', ()))} there"
            raise ValueError(
                f"checkpoint {checkpoint} is of another configuration: {key} is {tuple(value.shape)} here and {there}"
            )
    unknown = sorted(key for key in saved if key.startswith("model.model.") and key not in state)
    if unknown:
        raise ValueError(
            f"checkpoint {checkpoint} is of another configuration: it has {unknown[0]}, and the run's model has not"
        )
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
