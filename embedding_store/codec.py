"""Row codecs and page geometry: how one embedding row becomes bytes, and how many rows share a page.

Multi-byte values are little-endian on disk and on the wire; the kernels of `gather.py` read them in place, so
the host must be little-endian as well (every platform that numba compiles for here is).
"""

from __future__ import annotations

import re
import sys

import numpy as np
from numpy.typing import NDArray

from embedding_store.errors import InvalidRelease
from embedding_store.release import Codec, TableInfo

if sys.byteorder != "little":
    raise ImportError("embedding_store reads rows in place and needs a little-endian host")

CODECS: tuple[Codec, ...] = ("fp32", "fp16")
_DTYPES: dict[Codec, np.dtype[np.generic]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
_FP16_MAX = 65504.0

# A Redis string of n ≥ 256 bytes takes n + 6 (5 of header, 1 terminator). jemalloc's class is 8,192 bytes and the
# next one 10,240, so one byte more would waste a fifth of every page.
_SIZE_CLASS = 8192
_STRING_OVERHEAD = 6

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


def check_codec(codec: str) -> Codec:
    """Raises InvalidRelease."""
    for known in CODECS:
        if codec == known:
            return known
    raise InvalidRelease(f"row codec {codec!r} is unknown; accepted: {', '.join(CODECS)}")


def row_bytes(codec: Codec, dim: int) -> int:
    return dim * _DTYPES[check_codec(codec)].itemsize


def page_rows(row_bytes: int) -> int:
    """The most rows whose string stays in the 8 KiB allocation class: 63 of 128 bytes; a huge row has its own page."""
    return max(1, (_SIZE_CLASS - _STRING_OVERHEAD) // row_bytes)


def encode(codec: Codec, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 [n, dim] -> uint8 [n, row_bytes], without looking at the values: see `encode_table`."""
    if rows.ndim != 2:
        raise ValueError(f"rows must be [n, dim], not {rows.shape}")
    return np.ascontiguousarray(rows, dtype=_DTYPES[check_codec(codec)]).view(np.uint8)


def decode(codec: Codec, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [n, row_bytes] -> float32 [n, dim]."""
    typed = np.ascontiguousarray(rows).view(_DTYPES[check_codec(codec)])
    return typed.astype(np.float32)


def encode_table(table: str, codec: Codec, rows: NDArray[np.float32], first_id: int = 0) -> NDArray[np.uint8]:
    """As `encode`, for the rows first_id, first_id + 1, … of `table`.

    Raises InvalidRelease naming table, id and column of the first value that is NaN or infinite, or that the codec
    cannot hold.
    """
    limit = _FP16_MAX if codec == "fp16" else float(np.finfo(np.float32).max)
    # Rounding may carry a value just above the limit down to it; what counts is the encoded value.
    with np.errstate(over="ignore"):
        typed = np.ascontiguousarray(rows, dtype=_DTYPES[check_codec(codec)])
    finite = np.isfinite(typed)
    if not finite.all():
        row, column = np.unravel_index(int(np.argmin(finite)), finite.shape)
        value = float(rows[row, column])
        where = f"table {table!r}: id {first_id + int(row)}, column {int(column)} is {value:g}"
        if np.isfinite(value):
            raise InvalidRelease(f"{where}; {codec} holds at most ±{limit:g}: use the row codec fp32")
        raise InvalidRelease(f"{where}; rows must be finite")
    return typed.view(np.uint8)


def check_name(kind: str, name: str) -> str:
    """Names become file names and parts of keys. Raises InvalidRelease."""
    if not _NAME.fullmatch(name):
        raise InvalidRelease(
            f"{kind} {name!r}: a name has 1 to 128 letters, digits, '_', '.', '+', '-' and starts with none of '.+-'"
        )
    return name


def check_table(table: TableInfo) -> None:
    """Raises InvalidRelease where the geometry that a manifest states does not fit its codec."""
    check_name("table", table.name)
    expected = row_bytes(table.codec, table.dim)
    if table.row_bytes != expected:
        raise InvalidRelease(
            f"table {table.name!r}: row_bytes is {table.row_bytes}; {table.codec} of dim {table.dim} takes {expected}"
        )
    if table.default_row and len(table.default_row) != expected:
        raise InvalidRelease(
            f"table {table.name!r}: default_row has {len(table.default_row)} bytes instead of {expected} (or none)"
        )
