"""Source: rows of many files as one stream, the same for every reader that names the same seed, epoch and shard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from torchrank.data.columns import Columns
from torchrank.data.errors import DataError


@dataclass(frozen=True, slots=True)
class Piece:
    """The unit of reading, a row group or a block: rows first_row … first_row + rows - 1 of `file`."""

    file: str
    index: int
    first_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Order:
    """In which order a pass goes over the data, and which part of it this reader takes.

    Pieces are put in order (shuffled: by seed and epoch), then the row sequence is cut in `shards` contiguous ranges
    whose lengths differ by at most one. Shuffled rows are permuted inside their piece; with `request_column`, runs of
    equal values there move as one. A cut may fall inside a request: its two halves are then scored as two requests,
    which costs one more user row and changes no value.
    """

    shard: int = 0
    shards: int = 1
    seed: int = 0
    epoch: int = 0
    shuffle: bool = False
    request_column: str | None = None

    def rows(self, total: int) -> tuple[int, int]:
        """The range of the ordered rows that is this shard's."""
        if not 0 <= self.shard < self.shards:
            raise ValueError(f"shard {self.shard} of {self.shards}: accepted are 0 … {self.shards - 1}")
        return self.shard * total // self.shards, (self.shard + 1) * total // self.shards


class Source(ABC):
    """Subclasses know how to cut files in pieces and to read one. `path` is what the user named."""

    path: str

    @cached_property
    def pieces(self) -> Sequence[Piece]:
        """All pieces in the order of the files. Raises DataError for a file that cannot be read."""
        pieces = []
        for file, counts in self._piece_rows():
            first_row = 0
            for index, rows in enumerate(counts):
                pieces.append(Piece(file, index, first_row, rows))
                first_row += rows
        if not any(piece.rows for piece in pieces):
            raise DataError(self.path, found="0 rows", accepted="at least one row")
        return pieces

    @abstractmethod
    def _piece_rows(self) -> Iterator[tuple[str, Sequence[int]]]:
        """Each file in order, and the number of rows of each of its pieces. Raises DataError."""

    @abstractmethod
    def read(self, piece: Piece, columns: Columns) -> pa.RecordBatch:
        """The piece's rows, in file order, with `columns.names`. Raises DataError."""

    @abstractmethod
    def column_names(self) -> list[str]:
        """The columns of the first file."""

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    def stream(self, columns: Columns, order: Order | None = None, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """This shard's rows in order, without the first `skip`; one record batch per piece. Pieces outside the shard's
        range, or skipped whole, are never opened."""
        order = order or Order()
        first, last = order.rows(self.rows)
        if not 0 <= skip <= last - first:
            raise ValueError(f"skip {skip}: this shard has {last - first} rows")
        first += skip
        position = 0
        for number in _piece_order(len(self.pieces), order):
            piece = self.pieces[number]
            begin, end = max(first - position, 0), min(last - position, piece.rows)
            position += piece.rows
            if begin < end:
                yield self._read_part(piece, int(number), columns, order, begin, end)

    def _read_part(
        self, piece: Piece, number: int, columns: Columns, order: Order, begin: int, end: int
    ) -> pa.RecordBatch:
        batch = self.read(piece, columns)
        if batch.num_rows != piece.rows:
            found = f"{batch.num_rows} rows in piece {piece.index}, {piece.rows} when it was opened"
            raise DataError(piece.file, found=found, accepted="files that stay as they are while they are read")
        if not order.shuffle:
            return batch.slice(begin, end - begin)
        requests = None if order.request_column is None else batch.column(order.request_column)
        generator = np.random.default_rng([order.seed, order.epoch, number + 1])
        return batch.take(pa.array(_row_order(batch.num_rows, requests, generator)[begin:end]))


def _piece_order(pieces: int, order: Order) -> NDArray[np.int64]:
    if not order.shuffle:
        return np.arange(pieces)
    return np.random.default_rng([order.seed, order.epoch, 0]).permutation(pieces)


def _row_order(rows: int, requests: pa.Array | None, generator: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of 0 … rows - 1 that keeps each run of equal `requests` together and in order."""
    if requests is None:
        return generator.permutation(rows)
    changes = pc.fill_null(pc.not_equal(requests[1:], requests[:-1]), True).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    lengths = np.diff(starts, append=rows)
    chosen = generator.permutation(len(starts))
    lengths = lengths[chosen]
    ends = np.cumsum(lengths)
    return np.repeat(starts[chosen] - (ends - lengths), lengths) + np.arange(rows)
