"""Kernels over encoded rows: fetch them, pool them, pad them. A row is decoded where it is used, never before.

Shapes: m distinct rows, n asked ids, r output rows, T steps of a sequence, D columns of the output.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from embedding_store.codec import check_codec
from embedding_store.release import Codec

_TINY = np.float32(2.0**-24)  # value of the last bit of a subnormal half


@njit(cache=True, nogil=True)
def take_rows(
    table: NDArray[np.uint8], ids: NDArray[np.int64], rows: NDArray[np.uint8], found: NDArray[np.bool_]
) -> None:
    """rows[i] = table[ids[i]]; an id outside the table leaves its row as it is and found[i] False."""
    n_rows, width = table.shape
    for i in range(len(ids)):
        row = ids[i]
        found[i] = 0 <= row < n_rows
        if found[i]:
            for byte in range(width):
                rows[i, byte] = table[row, byte]


@njit(cache=True, nogil=True)
def _half(bits: np.uint16) -> np.float32:
    """The float32 of an IEEE half, exact for all 65,536. Subnormals go by multiplication of a normal number, so that
    a thread which flushes denormals to zero (ONNX Runtime can be told to) reads the same values."""
    h = np.uint32(bits)
    sign = np.uint32((h & np.uint32(0x8000)) << np.uint32(16))
    magnitude = np.uint32(h & np.uint32(0x7FFF))
    if magnitude < np.uint32(0x0400):
        bits32 = np.float32(np.float32(magnitude) * _TINY).view(np.uint32)
    elif magnitude < np.uint32(0x7C00):
        bits32 = np.uint32((magnitude << np.uint32(13)) + np.uint32(0x38000000))
    else:
        bits32 = np.uint32((magnitude << np.uint32(13)) | np.uint32(0x7F800000))
    return np.uint32(bits32 | sign).view(np.float32)


def _value(raw: np.float32 | np.uint16) -> np.float32:
    """float32 as it is, uint16 as a half: chosen by type when a kernel is compiled, see below."""
    raise NotImplementedError("only kernels call this")


@overload(_value, inline="always")
def _value_of_type(raw):  # type: ignore[no-untyped-def]  # numba holds annotations against those of the lambdas
    if raw == types.uint16:
        return lambda raw: _half(raw)  # noqa: PLW0108  # numba inlines a function of this module only
    return lambda raw: raw


@njit(cache=True, nogil=True)
def _pool(rows, index, offsets, out, start, mean, weights):  # type: ignore[no-untyped-def]
    dim = rows.shape[1]
    for r in range(len(offsets) - 1):
        target = out[r, start : start + dim]
        first, last = offsets[r], offsets[r + 1]
        for d in range(dim):
            target[d] = np.float32(0)
        for i in range(first, last):
            row = rows[index[i]]
            if weights is None:
                for d in range(dim):
                    target[d] += _value(row[d])
            else:
                for d in range(dim):
                    target[d] += weights[i] * _value(row[d])
        if mean and last - first > 1:
            count = np.float32(last - first)
            for d in range(dim):
                target[d] /= count


@njit(cache=True, nogil=True)
def _pad(rows, index, offsets, out):  # type: ignore[no-untyped-def]
    steps, dim = out.shape[1], out.shape[2]
    for r in range(len(offsets) - 1):
        length = min(steps, offsets[r + 1] - offsets[r])
        for t in range(length):
            row = rows[index[offsets[r] + t]]
            for d in range(dim):
                out[r, t, d] = _value(row[d])
        for t in range(length, steps):
            for d in range(dim):
                out[r, t, d] = np.float32(0)


def pool_into(
    codec: Codec,
    rows: NDArray[np.uint8],
    index: NDArray[np.int64],
    offsets: NDArray[np.int64],
    out: NDArray[np.float32],
    start: int,
    dim: int,
    mean: bool,
    weights: NDArray[np.float32] | None = None,
) -> None:
    """out[r, start : start + dim] = Σ w_i · row(index_i) over i in offsets[r] … offsets[r + 1]; w_i = 1 if None.

    rows uint8 [m, row_bytes], index int64 [n], offsets int64 [r + 1], out float32 [r, D], weights float32 [n].
    `mean` divides by the number of ids, as fbgemm does, also with weights. A row without ids becomes zeros.
    Sums are float32, in order. `index` is not checked: it comes from a look-up.
    """
    typed = _typed(codec, rows, dim)
    if out.shape[0] != len(offsets) - 1 or start < 0 or start + dim > out.shape[1]:
        raise ValueError(f"{len(offsets) - 1} rows, columns {start} to {start + dim} do not fit into out {out.shape}")
    _check_values(index, offsets)
    _pool(typed, index, offsets, out, start, mean, weights)


def pad_into(
    codec: Codec,
    rows: NDArray[np.uint8],
    index: NDArray[np.int64],
    offsets: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    """out[r, t] = row(index[offsets[r] + t]) for the first T values of row r, zeros beyond them.

    rows uint8 [m, row_bytes], index int64 [n], offsets int64 [r + 1], out float32 [r, T, dim].
    """
    typed = _typed(codec, rows, out.shape[2])
    if out.shape[0] != len(offsets) - 1:
        raise ValueError(f"{len(offsets) - 1} rows do not fit into out {out.shape}")
    _check_values(index, offsets)
    _pad(typed, index, offsets, out)


def _typed(codec: Codec, rows: NDArray[np.uint8], dim: int) -> NDArray[np.float32] | NDArray[np.uint16]:
    """The same memory, [m, dim]. Numba has no half type, so halves go by their bits."""
    check_codec(codec)
    typed = rows.view(np.float32) if codec == "fp32" else rows.view(np.uint16)
    if typed.shape[1] != dim:
        raise ValueError(f"{codec} rows of {rows.shape[1]} bytes have dim {typed.shape[1]}, not {dim}")
    return typed


def _check_values(index: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
    if offsets[-1] != len(index):
        raise ValueError(f"offsets end at {offsets[-1]}, but {len(index)} values were looked up")
