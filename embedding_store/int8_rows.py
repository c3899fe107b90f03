"""The int8 codec: `dim` bytes q, then the row's scale and offset as fp16; value = offset + scale · q in float32.

Both ends of the row's range are rounded outwards (the offset down, the scale up), so that nothing is clipped:

    |value - x| ≤ scale / 2 + 2^-24 · |value|,   scale ≤ (1 + 2^-10) / 255 · (max - min + 2^-10 · |min|) + 2^-23

The last term is of the order of the smallest half: a row that spans less than 1e-5 wants another codec. A row of one
value c comes back within 2^-18 · |c| + 2^-24, finer than fp16, because q spans what the offset lacks; zeros as zeros.
scale · q has 19 significant bits, so it is exact in float32, and a fused multiply-add changes nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TAIL_BYTES = 4  # scale, offset
LOWEST = -65504.0
WIDEST = 255 * 65504.0  # from the offset to the largest value
_MOST = np.float64(255)


def encode_int8(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 [n, dim] -> uint8 [n, dim + 4]. Where a row cannot be held, its scale or offset is not finite."""
    encoded = np.empty((len(rows), rows.shape[1] + TAIL_BYTES), np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        offset = _half_below(rows.min(axis=1).astype(np.float64))
        from_offset = rows - offset.astype(np.float64)[:, None]
        scale = -_half_below(-from_offset.max(axis=1) / _MOST)
        step = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
        from_offset /= step
        encoded[:, :-TAIL_BYTES] = np.rint(from_offset, out=from_offset).astype(np.uint8)
    encoded[:, -TAIL_BYTES:] = np.stack((scale, offset), axis=1).astype("<f2").view(np.uint8)
    return encoded


def decode_int8(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [n, dim + 4] -> float32 [n, dim]."""
    tails = scales_and_offsets(rows).astype(np.float32)
    values = rows[:, :-TAIL_BYTES].astype(np.float32)
    values *= tails[:, :1]
    values += tails[:, 1:]
    return values


def scales_and_offsets(rows: NDArray[np.uint8]) -> NDArray[np.float16]:
    """uint8 [n, dim + 4] -> float16 [n, 2]."""
    return np.ascontiguousarray(rows[:, -TAIL_BYTES:]).view("<f2")


def _half_below(values: NDArray[np.float64]) -> NDArray[np.float16]:
    """The largest half that is not above the value; -inf where there is none."""
    halves = values.astype(np.float16)
    return np.where(halves > values, np.nextafter(halves, np.float16(-np.inf)), halves)
