"""Kernels that pool and pad encoded rows. A row is decoded where it is used, never before.

Shapes: m distinct rows, n asked ids, r output rows, T steps of a sequence, D columns of the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from embedding_store.codec import row_bytes
from embedding_store.half import float_to_half, half_to_float
from embedding_store.release import Codec

_KERNEL_TYPES: dict[Codec, type[np.generic]] = {"fp32": np.float32, "fp16": np.uint16, "int8": np.uint8}


def _tail(row: NDArray[np.generic]) -> tuple[np.float32, np.float32]:
    """Scale and offset of an int8 row; of no meaning for others. Chosen by type when a kernel is compiled."""
    raise NotImplementedError("only kernels call this")


@overload(_tail, inline="always")
def _tail_of_type(row):  # type: ignore[no-untyped-def]  # numba holds annotations against those of the lambdas
    if row.dtype == types.uint8:
        return lambda row: (_half_at(row, len(row) - 4), _half_at(row, len(row) - 2))
    return lambda row: (np.float32(1), np.float32(0))


@njit(cache=True, nogil=True, inline="always")
def _half_at(row, start):  # type: ignore[no-untyped-def]
    return half_to_float(np.uint16(row[start]) | np.uint16(row[start + 1]) << np.uint16(8))


def _value(raw: np.generic, scale: np.float32, offset: np.float32) -> np.float32:
    """float32 as it is, uint16 as a half, uint8 by its row's tail."""
    raise NotImplementedError("only kernels call this")


@overload(_value, inline="always")
def _value_of_type(raw, scale, offset):  # type: ignore[no-untyped-def]
    if raw == types.uint16:
        return lambda raw, scale, offset: half_to_float(raw)
    if raw == types.uint8:
        return lambda raw, scale, offset: offset + scale * np.float32(raw)
    return lambda raw, scale, offset: raw


def _stored(value: np.float32, target: NDArray[np.generic]) -> np.generic:
    """What an array like `target` holds for this value: a uint16 one its half, a float32 one itself."""
    raise NotImplementedError("only kernels call this")


@overload(_stored, inline="always")
def _stored_of_type(value, target):  # type: ignore[no-untyped-def]
    if target.dtype == types.uint16:
        return lambda value, target: float_to_half(value)
    return lambda value, target: value


@njit(cache=True, nogil=True, inline="always")
def _copy(row, weight, target):  # type: ignore[no-untyped-def]
    scale, offset = _tail(row)
    for d in range(len(target)):
        value = _value(row[d], scale, offset)
        target[d] = _stored(value if weight is None else weight * value, target)


@njit(cache=True, nogil=True, inline="always")
def _add(row, weight, total):  # type: ignore[no-untyped-def]
    scale, offset = _tail(row)
    for d in range(len(total)):
        value = _value(row[d], scale, offset)
        total[d] += value if weight is None else weight * value


@njit(cache=True, nogil=True)
def _pool(rows, index, offsets, out, start, dim, mean, weights):  # type: ignore[no-untyped-def]
    """Sums in one row that stays in the processor's cache: up to twice as fast as in `out`, and float32 in any case."""
    total = np.empty(dim, np.float32)
    for r in range(len(offsets) - 1):
        target = out[r, start : start + dim]
        first, last = offsets[r], offsets[r + 1]
        if first == last:
            target[:] = 0
            continue
        _copy(rows[index[first]], None if weights is None else weights[first], total)
        for i in range(first + 1, last):
            _add(rows[index[i]], None if weights is None else weights[i], total)
        if mean and last - first > 1:
            count = np.float32(last - first)
            for d in range(dim):
                total[d] /= count
        for d in range(dim):
            target[d] = _stored(total[d], target)


@njit(cache=True, nogil=True)
def _pad(rows, index, offsets, out):  # type: ignore[no-untyped-def]
    steps = out.shape[1]
    for r in range(len(offsets) - 1):
        length = min(steps, offsets[r + 1] - offsets[r])
        for t in range(length):
            _copy(rows[index[offsets[r] + t]], None, out[r, t])
        out[r, length:] = 0


def pool_into(
    codec: Codec,
    rows: NDArray[np.uint8],
    index: NDArray[np.int64],
    offsets: NDArray[np.int64],
    out: NDArray[np.floating[Any]],
    start: int,
    dim: int,
    mean: bool,
    weights: NDArray[np.float32] | None = None,
) -> None:
    """out[r, start : start + dim] = Σ w_i · row(index_i) over i in offsets[r] … offsets[r + 1]; w_i = 1 if None.

    rows uint8 [m, row_bytes], index int64 [n], offsets int64 [r + 1], out float32 or float16 [r, D], weights float32
    [n]. `mean` divides by the number of ids, as fbgemm does, also with weights. A row without ids becomes zeros.
    Sums are float32, in order, and rounded once where `out` is float16. `index` is not checked: it comes from a
    look-up.
    """
    typed = _typed(codec, rows, dim)
    if out.shape[0] != len(offsets) - 1 or start < 0 or start + dim > out.shape[1]:
        raise ValueError(f"{len(offsets) - 1} rows, columns {start} to {start + dim} do not fit into out {out.shape}")
    _check_values(index, offsets)
    _pool(typed, index, offsets, _floats(out), start, dim, mean, weights)


def pad_into(
    codec: Codec,
    rows: NDArray[np.uint8],
    index: NDArray[np.int64],
    offsets: NDArray[np.int64],
    out: NDArray[np.floating[Any]],
) -> None:
    """out[r, t] = row(index[offsets[r] + t]) for the first T values of row r, zeros beyond them.

    rows uint8 [m, row_bytes], index int64 [n], offsets int64 [r + 1], out float32 or float16 [r, T, dim].
    """
    typed = _typed(codec, rows, out.shape[2])
    if out.shape[0] != len(offsets) - 1:
        raise ValueError(f"{len(offsets) - 1} rows do not fit into out {out.shape}")
    _check_values(index, offsets)
    _pad(typed, index, offsets, _floats(out))


def _typed(codec: Codec, rows: NDArray[np.uint8], dim: int) -> NDArray[np.generic]:
    """The same memory as the kernels want it: float32 or the bits of halves [m, dim], bytes [m, dim + 4]."""
    width = row_bytes(codec, dim)
    if rows.shape[1] != width:
        raise ValueError(f"{codec} rows of dim {dim} have {width} bytes, not {rows.shape[1]}")
    return rows.view(_KERNEL_TYPES[codec])


def _floats(out: NDArray[np.floating[Any]]) -> NDArray[np.generic]:
    if out.dtype == np.float16:
        return out.view(np.uint16)
    if out.dtype == np.float32:
        return out
    raise ValueError(f"out is {out.dtype}; accepted: float32, float16")


def _check_values(index: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
    if offsets[-1] != len(index):
        raise ValueError(f"offsets end at {offsets[-1]}, but {len(index)} values were looked up")
