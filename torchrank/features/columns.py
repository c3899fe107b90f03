"""Raw columns as the operators read them, whether they came out of a file or out of a request.

Missing values have one form per type: an empty string, a NaN, a mark in `missing`. Every array is read-only, as
Arrow's buffers are: numba compiles a kernel once for read-only arrays and once for others, and half of that is enough.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from types import NoneType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchrank.features.errors import FeatureError
from torchrank.features.spec import ColumnType

A = TypeVar("A", bound=NDArray[Any])
Place = Callable[[int], str]  # where row i stands: `candidates[3].price`


@dataclass(frozen=True, slots=True)
class Strings:
    """UTF-8: value i is data[offsets[i] : offsets[i + 1]]. data: uint8 [bytes]; offsets: int64 [n + 1]."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Ints:
    """values: int64 [n]; missing: bool [n], or [0] where none is."""

    values: NDArray[np.int64]
    missing: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class Floats:
    """values: float32 [n], NaN where missing."""

    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.values)


Scalars = Strings | Ints | Floats


@dataclass(frozen=True, slots=True)
class Lists:
    """Row i is elements offsets[i] … offsets[i + 1]. offsets: int64 [n + 1] from 0; missing: as in Ints."""

    offsets: NDArray[np.int64]
    missing: NDArray[np.bool_]
    elements: Scalars

    def __len__(self) -> int:
        return len(self.offsets) - 1


RawColumn = Scalars | Lists


def frozen(array: A) -> A:
    array.flags.writeable = False
    return array


NONE_MISSING: NDArray[np.bool_] = frozen(np.empty(0, dtype=np.bool_))


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return frozen(offsets)


def column_from_values(values: Sequence[Any], kind: ColumnType, place: Place) -> RawColumn:
    """A column from Python values, None being a missing one. Raises FeatureError with the place of the first bad."""
    if kind.startswith("list<"):
        return _lists(values, kind[len("list<") : -1], place)
    return _scalars(values, kind, place)


def _scalars(values: Sequence[Any], kind: str, place: Place) -> Scalars:
    if kind == "string":
        return _strings(values, place)
    return _ints(values, place) if kind == "int64" else _floats(values, place)


def _strings(values: Sequence[Any], place: Place) -> Strings:
    """One encoding of all values together: the price of encoding each is paid only where they are not ASCII."""
    try:
        joined = "".join(values)
    except TypeError:
        if set(map(type, values)) <= {str, NoneType}:
            values = [value or "" for value in values]
        else:
            values = [_text(value, place, row) for row, value in enumerate(values)]
        joined = "".join(values)
    try:
        data = joined.encode()
    except UnicodeEncodeError:
        row = next(row for row, value in enumerate(values) if any("\ud800" <= char <= "\udfff" for char in value))
        raise _refused(values[row], "text that UTF-8 can hold", place(row)) from None
    sizes = map(len, values) if len(data) == len(joined) else (len(value.encode()) for value in values)
    lengths = np.fromiter(sizes, dtype=np.int64, count=len(values))
    return Strings(np.frombuffer(data, dtype=np.uint8), offsets_of(lengths))


def _text(value: object, place: Place, row: int) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise _refused(value, "a string or null", place(row))


def _ints(values: Sequence[Any], place: Place) -> Ints:
    array = _array(values, "bi")
    if array is not None:
        return Ints(frozen(array.astype(np.int64)), NONE_MISSING)
    if set(map(type, values)) <= {int, NoneType}:
        with suppress(OverflowError):  # then one is beyond 64 bits, and the loop below finds it
            filled = np.array([0 if value is None else value for value in values], dtype=np.int64)
            return Ints(frozen(filled), frozen(np.array([value is None for value in values])))
    out, missing = np.zeros(len(values), dtype=np.int64), np.zeros(len(values), dtype=np.bool_)
    for row, value in enumerate(values):
        if value is None:
            missing[row] = True
        elif isinstance(value, int | np.integer | np.bool_) and -(2**63) <= value < 2**63:
            out[row] = value
        else:
            raise _refused(value, "an integer of 64 bits or null", place(row))
    return Ints(frozen(out), frozen(missing))


def _floats(values: Sequence[Any], place: Place) -> Floats:
    array = _array(values, "bif")
    if array is None and set(map(type, values)) <= {int, float, NoneType}:
        with suppress(OverflowError):  # an int of more than 1,024 bits, which the loop below finds
            array = np.array(values, dtype=np.float64)  # None becomes NaN
    if array is None:
        array = np.array([_number(value, place, row) for row, value in enumerate(values)], dtype=np.float64)
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and the operators judge that
        return Floats(frozen(array.astype(np.float64).astype(np.float32)))


def _number(value: object, place: Place, row: int) -> float:
    if value is None:
        return math.nan
    try:
        if isinstance(value, int | float | np.integer | np.floating | np.bool_):
            return float(value)
    except OverflowError:  # an int of more than 1,024 bits
        pass
    raise _refused(value, "a number or null", place(row))


def _array(values: Sequence[Any], kinds: str) -> NDArray[Any] | None:
    """All values at once where they are of these dtype kinds, None where each needs a look of its own."""
    if not values:
        return np.empty(0)
    try:
        array = np.array(values)
    except (ValueError, OverflowError):  # lists of different lengths among them, integers without end
        return None
    return array if array.ndim == 1 and array.dtype.kind in kinds else None


def _lists(values: Sequence[Any], kind: str, place: Place) -> Lists:
    missing = NONE_MISSING
    kinds = set(map(type, values))
    if not kinds <= {list, tuple}:
        if not kinds <= {list, tuple, NoneType}:
            for row, value in enumerate(values):
                if value is not None and not isinstance(value, list | tuple):
                    raise _refused(value, f"a list of {kind} or null", place(row))
        missing = frozen(np.array([value is None for value in values]))
        values = [value or () for value in values]
    offsets = offsets_of(np.fromiter(map(len, values), dtype=np.int64, count=len(values)))

    def element(position: int) -> str:
        row = int(np.searchsorted(offsets, position, side="right")) - 1
        return f"{place(row)}[{position - int(offsets[row])}]"

    return Lists(offsets, missing, _scalars(list(chain.from_iterable(values)), kind, element))


def _refused(value: object, accepted: str, field: str) -> FeatureError:
    found = f"{type(value).__name__} {reprlib.repr(value)}"
    return FeatureError(f"{field}: found {found}; accepted: {accepted}", field)
