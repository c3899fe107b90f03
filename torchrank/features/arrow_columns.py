"""Raw columns out of Arrow arrays, without a copy where Arrow's layout is ours already.

The only module of this package that imports pyarrow; `FeatureTransform.from_arrow` imports it when it is called.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from torchrank.features.columns import NONE_MISSING, Floats, Ints, Lists, RawColumn, Scalars, Strings, frozen
from torchrank.features.errors import FeatureError
from torchrank.features.spec import ColumnType

_ACCEPTED = {
    "string": "string, large_string, string_view, or a dictionary of them",
    "int64": "integers, bool, or a dictionary of them",
    "float32": "floats, integers, decimals, bool, or a dictionary of them",
}


def column_from_arrow(
    name: str, array: pa.Array | pa.ChunkedArray, kind: ColumnType, rows: NDArray[np.int64] | None = None
) -> RawColumn:
    """The column, or only these rows of it. Raises FeatureError where its type is not what it was declared as."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    array = _without_views(array)
    if rows is not None:
        array = array.take(rows)
    if not kind.startswith("list<"):
        return _scalars(name, array, kind)
    if pa.types.is_null(array.type):
        array = array.cast(pa.list_(pa.null()))
    if not any(is_a(array.type) for is_a in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        accepted = "list, large_list or fixed_size_list"
        raise FeatureError(f"column {name!r}: found {array.type}; accepted for {kind}: {accepted}", name)
    return _lists(name, array, kind[len("list<") : -1])


def _without_views(array: pa.Array) -> pa.Array:
    """pyarrow cannot take rows of string views."""
    if pa.types.is_string_view(array.type):
        return array.cast(pa.large_string())
    if pa.types.is_list(array.type) and pa.types.is_string_view(array.type.value_type):
        return array.cast(pa.list_(pa.large_string()))
    return array


def _lists(name: str, array: pa.Array, element: str) -> Lists:
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])  # `values` knows nothing of array's own slice
    return Lists(frozen(offsets - offsets[0]), _missing(array), _scalars(name, values, element))


def _scalars(name: str, array: pa.Array, kind: str) -> Scalars:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not _fits(array.type, kind):
        raise FeatureError(f"column {name!r}: found {array.type}; accepted for {kind}: {_ACCEPTED[kind]}", name)
    try:
        if kind == "string":
            return _strings(array)
        return _ints(array) if kind == "int64" else _floats(array)
    except pa.ArrowInvalid as error:  # a uint64 that int64 cannot hold
        raise FeatureError(f"column {name!r}: {error}", name) from error


def _fits(found: pa.DataType, kind: str) -> bool:
    if pa.types.is_null(found):
        return True
    if kind == "string":
        return any(test(found) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    if pa.types.is_integer(found) or pa.types.is_boolean(found):
        return True
    return kind == "float32" and (pa.types.is_floating(found) or pa.types.is_decimal(found))


def _strings(array: pa.Array) -> Strings:
    """Without a copy of the text. Offsets of `string` are 32 bits wide and are widened."""
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        array = array.cast(pa.large_string())
    offsets = _offsets(array)
    missing = _missing(array)
    if len(missing) and np.diff(offsets)[missing].any():  # Arrow lets a null hide text
        array = pc.fill_null(array, "")
        offsets = _offsets(array)
    data = array.buffers()[2]
    text = np.empty(0, dtype=np.uint8) if data is None else np.frombuffer(data, dtype=np.uint8)
    return Strings(frozen(text), frozen(offsets))


def _offsets(array: pa.Array) -> NDArray[np.int64]:
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    buffer = array.buffers()[1]
    if buffer is None or buffer.size == 0:  # Arrow lets an empty array go without
        return np.zeros(1, dtype=np.int64)
    return np.frombuffer(buffer, dtype=width)[array.offset : array.offset + len(array) + 1].astype(np.int64, copy=False)


def _ints(array: pa.Array) -> Ints:
    missing = _missing(array)
    if not pa.types.is_int64(array.type):
        array = array.cast(pa.int64())
    values = np.frombuffer(array.buffers()[1], dtype=np.int64) if len(array) else np.empty(0, dtype=np.int64)
    return Ints(frozen(values[array.offset : array.offset + len(array)]), missing)


def _floats(array: pa.Array) -> Floats:
    if not pa.types.is_floating(array.type):
        array = array.cast(pa.float64(), safe=False)  # and then to float32: the way of a number in a request
    values = array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)  # nulls become NaN
    return Floats(frozen(values.astype(np.float32, copy=False)))


def _missing(array: pa.Array) -> NDArray[np.bool_]:
    return frozen(array.is_null().to_numpy(zero_copy_only=False)) if array.null_count else NONE_MISSING


def first_rows_of_requests(name: str, array: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """The rows at which the value of the request column changes, int64 [U], from 0."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if array.null_count:
        row = int(pc.index(array.is_null(), True).as_py())
        raise FeatureError(f"column {name!r}: row {row} is null; a request column has a value in every row", name)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if len(array) == 0:
        return np.empty(0, dtype=np.int64)
    changed = pc.not_equal(array.slice(1), array.slice(0, len(array) - 1)).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(changed) + 1])
