"""Parquet files, read by row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from torchrank.data.columns import Columns, check_present, convert
from torchrank.data.errors import DataError
from torchrank.data.files import Files, find_files
from torchrank.data.source import Piece, Source

_ACCEPTED = "a complete Parquet file"


class ParquetSource(Source):
    """`path`: file, folder (all *.parquet below it), glob or fsspec URL.

    Only footers are read to learn the row counts. A row group is the unit of memory: 50,000 – 200,000 rows do well.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def column_names(self) -> list[str]:
        return list(self._footers[self._files.names[0]].schema.to_arrow_schema().names)

    def _piece_rows(self) -> Iterator[tuple[str, Sequence[int]]]:
        for file, footer in self._footers.items():
            yield file, [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]

    def read(self, piece: Piece, columns: Columns) -> pa.RecordBatch:
        footer = self._footers[piece.file]
        check_present(piece.file, list(footer.schema.to_arrow_schema().names), columns.names)
        try:
            with self._files.open(piece.file) as file:
                reader = pq.ParquetFile(file, metadata=footer)
                # use_threads: decoding runs beside training, on as many cores as Arrow's pool has
                table = reader.read_row_group(piece.index, columns=columns.names)
        except (pa.ArrowException, OSError) as error:
            found = f"row group {piece.index} that cannot be read ({error})"
            raise DataError(piece.file, found=found, accepted=_ACCEPTED) from error
        return convert(piece.file, piece.first_row, table, columns)

    @cached_property
    def _files(self) -> Files:
        return find_files(self.path, ".parquet")

    @cached_property
    def _footers(self) -> dict[str, pq.FileMetaData]:
        return {name: self._footer(name) for name in self._files.names}

    def _footer(self, name: str) -> pq.FileMetaData:
        try:
            with self._files.open(name) as file:
                return pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(name, found=f"no readable footer ({error})", accepted=_ACCEPTED) from error
