"""CSV files, read by blocks of whole lines."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from torchrank.data.columns import ARROW_TYPES, Columns, check_present, convert
from torchrank.data.errors import DataError
from torchrank.data.files import Files, find_files
from torchrank.data.source import Piece, Source
from torchrank.features.spec import ColumnType

_ACCEPTED = "lines of equally many values, UTF-8, uncompressed, no line break inside quotes"
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class _Layout:
    """A file's column names, and bytes starts[i] … starts[i + 1] of its block i."""

    names: list[str]
    starts: list[int]
    rows: list[int]


class CsvSource(Source):
    """`path`: file, folder (all *.csv below it), glob or fsspec URL.

    The first line names the columns unless `column_names` does. List columns are one value whose elements are parted by
    `list_separator`; an empty one is an empty list. Empty numbers are missing values. Before the first row every reader
    goes once over all bytes to count lines (about a second per GB), so that ranges and resuming are exact.
    """

    def __init__(
        self,
        path: str,
        *,
        delimiter: str = ",",
        list_separator: str = "|",
        column_names: Sequence[str] | None = None,
        block_bytes: int = 8 << 20,
    ) -> None:
        self.path = path
        self._delimiter = delimiter
        self._list_separator = list_separator
        self._column_names = None if column_names is None else list(column_names)
        self._block_bytes = block_bytes

    def column_names(self) -> list[str]:
        return list(self._layouts[self._files.names[0]].names)

    def _piece_rows(self) -> Iterator[tuple[str, Sequence[int]]]:
        for file, layout in self._layouts.items():
            yield file, layout.rows

    def read(self, piece: Piece, columns: Columns) -> pa.RecordBatch:
        layout = self._layouts[piece.file]
        check_present(piece.file, layout.names, columns.names)
        with self._files.open(piece.file) as file:
            file.seek(layout.starts[piece.index])
            text = file.read(layout.starts[piece.index + 1] - layout.starts[piece.index])
        table = self._parse(piece, text, layout.names, columns)
        for name, wanted in columns.types.items():
            if wanted.startswith("list<"):
                lists = self._split(piece.file, name, table.column(name), wanted)
                table = table.set_column(table.schema.get_field_index(name), name, lists)
        return convert(piece.file, piece.first_row, table, columns)

    def _parse(self, piece: Piece, text: bytes, names: list[str], columns: Columns) -> pa.Table:
        # Kept columns stay text, so that every block of a file has the same types.
        types = {name: pa.string() for name in columns.names}
        types |= {name: ARROW_TYPES[kind] for name, kind in columns.types.items() if not kind.startswith("list<")}
        types |= {name: pa.float32() for name in columns.labels}
        try:
            return pyarrow.csv.read_csv(
                io.BytesIO(text),
                # one block, one parse: the file is already cut
                read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=max(len(text), 1)),
                parse_options=pyarrow.csv.ParseOptions(delimiter=self._delimiter),
                convert_options=pyarrow.csv.ConvertOptions(include_columns=columns.names, column_types=types),
            )
        except pa.ArrowInvalid as error:
            last = piece.first_row + piece.rows - 1
            found = f"a value that does not fit, in rows {piece.first_row} … {last} ({_named(error, names)})"
            raise DataError(piece.file, found=found, accepted=f"{_ACCEPTED}; numbers in number columns") from error

    def _split(self, file: str, name: str, values: pa.ChunkedArray, wanted: ColumnType) -> pa.ChunkedArray:
        lists = pc.split_pattern(values, self._list_separator).combine_chunks()
        if isinstance(lists, pa.ChunkedArray):
            lists = pa.concat_arrays(lists.chunks)
        # "" splits into one empty element, which here means none
        empty = pc.equal(pc.binary_length(values), 0)
        lists = pc.if_else(empty.combine_chunks(), pa.scalar([], lists.type), lists)
        try:
            return pa.chunked_array([pc.cast(lists, ARROW_TYPES[wanted])])
        except pa.ArrowInvalid as error:
            raise DataError(file, column=name, found=str(error), accepted=wanted) from error

    @cached_property
    def _files(self) -> Files:
        return find_files(self.path, ".csv")

    @cached_property
    def _layouts(self) -> dict[str, _Layout]:
        return {name: self._layout(name) for name in self._files.names}

    def _layout(self, name: str) -> _Layout:
        with self._files.open(name) as file:
            names, position = self._header(name, file)
            starts, rows = [position], []
            while block := _whole_lines(file, self._block_bytes):
                position += len(block)
                starts.append(position)
                rows.append(_count_rows(block))
        return _Layout(names, starts, rows)

    def _header(self, name: str, file: Any) -> tuple[list[str], int]:
        """The column names, and where the first row begins; `file` stands there afterwards."""
        if file.read(2) == _GZIP:
            raise DataError(name, found="a gzip file, which cannot be read by blocks", accepted=_ACCEPTED)
        file.seek(0)
        if self._column_names is not None:
            return self._column_names, 0
        line = _whole_lines(file, 1)
        if not line.strip():
            raise DataError(name, found="no header line", accepted="a first line that names the columns")
        try:
            parsed = pyarrow.csv.read_csv(
                io.BytesIO(line), parse_options=pyarrow.csv.ParseOptions(delimiter=self._delimiter)
            )
        except pa.ArrowInvalid as error:
            raise DataError(name, found=f"a header that cannot be read ({error})", accepted=_ACCEPTED) from error
        return list(parsed.column_names), len(line)


def _whole_lines(file: Any, size: int) -> bytes:
    """About `size` bytes up to and including a line break, or what is left of the file; the file stands behind them."""
    start = file.tell()
    block = bytes(file.read(size))
    if len(block) < size or block.endswith(b"\n"):
        return block
    while more := bytes(file.read(1 << 16)):
        end = more.find(b"\n")
        if end >= 0:
            block += more[: end + 1]
            file.seek(start + len(block))
            return block
        block += more
    return block


def _count_rows(block: bytes) -> int:
    """Lines that are not empty (Arrow's reader skips empty ones)."""
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(data))
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    only_return = (lengths == 1) & (data[np.minimum(starts, len(data) - 1)] == ord("\r"))
    return int(np.count_nonzero((lengths > 0) & ~only_return))


def _named(error: pa.ArrowInvalid, names: list[str]) -> str:
    """Arrow's message says `column #3`; users know it by name."""
    message = str(error)
    for number in range(len(names) - 1, -1, -1):
        message = message.replace(f"In CSV column #{number}:", f"column {names[number]!r}:")
    return message
