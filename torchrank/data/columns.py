"""Which columns are read, and how a column of a file becomes the type that the features declare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrank.data.errors import DataError
from torchrank.features.spec import ColumnType

ARROW_TYPES: dict[ColumnType, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "list<string>": pa.list_(pa.string()),
    "list<int64>": pa.list_(pa.int64()),
    "list<float32>": pa.list_(pa.float32()),
}
_ACCEPTED = {
    "string": "string (plain, large or dictionary-encoded)",
    "int64": "int64 (any integer type or bool)",
    "float32": "float32 (any float, integer or decimal type, or bool)",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """What is read of each file: features cast to their declared types, labels checked to be 0 or 1 and made
    float32, and other columns kept as the file has them. A column named twice is read once: the declared type first."""

    types: Mapping[str, ColumnType] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.types, *self.labels, *self.keep]))


def check_present(file: str, present: list[str], wanted: list[str]) -> None:
    """Raises DataError for the first wanted column that the file lacks."""
    for name in wanted:
        if name not in present:
            raise DataError(
                file, column=name, found="no such column", accepted=f"one of the file's: {', '.join(present) or 'none'}"
            )


def convert(file: str, first_row: int, table: pa.Table, columns: Columns) -> pa.RecordBatch:
    """The columns in the order of `columns.names`, each one contiguous and of its type. `first_row` is where in the
    file the table begins (for messages)."""
    arrays = []
    for name in columns.names:
        values = table.column(name).combine_chunks()
        if isinstance(values, pa.ChunkedArray):  # a table of no rows, or more than fits one array
            values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
        if name in columns.types:
            values = cast(file, name, values, columns.types[name])
        elif name in columns.labels:
            values = label(file, first_row, name, values)
        arrays.append(values)
    return pa.record_batch(arrays, names=columns.names)


def cast(file: str, name: str, values: pa.Array, wanted: ColumnType) -> pa.Array:
    """`values` as the Arrow type of `wanted`. Numbers widen, strings are never parsed and numbers never printed."""
    target = ARROW_TYPES[wanted]
    if values.type == target:
        return values
    if not _castable(values.type, target):
        raise DataError(file, column=name, found=str(values.type), accepted=_describe(wanted))
    try:
        # float32 rounds (16777217 becomes 16777216); for the others a value that does not fit is an error.
        return pc.cast(values, target, safe="float32" not in wanted)
    except pa.ArrowInvalid as error:
        raise DataError(file, column=name, found=f"{values.type}: {error}", accepted=_describe(wanted)) from error


def label(file: str, first_row: int, name: str, values: pa.Array) -> pa.Array:
    """float32 labels, each 0 or 1."""
    accepted = "0 or 1 (integer, float or bool)"
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(file, column=name, found=str(kind), accepted=accepted)
    numbers = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)  # null becomes NaN
    wrong = np.flatnonzero((numbers != 0) & (numbers != 1))
    if len(wrong):
        row = int(wrong[0])
        found = f"{values[row].as_py()} in row {first_row + row} (rows count from 0)"
        raise DataError(file, column=name, found=found, accepted=accepted)
    return pa.array(numbers.astype(np.float32))


def _castable(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        return _castable(found.value_type, wanted)
    if pa.types.is_null(found):
        return True
    if pa.types.is_list(wanted):
        return _is_list(found) and _castable(found.value_type, wanted.value_type)
    if pa.types.is_string(wanted):
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found))
    if pa.types.is_integer(found) or pa.types.is_boolean(found):
        return True
    return bool(pa.types.is_float32(wanted) and (pa.types.is_floating(found) or pa.types.is_decimal(found)))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _describe(wanted: ColumnType) -> str:
    element = wanted.removeprefix("list<").removesuffix(">")
    return _ACCEPTED[element] if element == wanted else f"a list of {_ACCEPTED[element]}"
