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
from embedding_store.int8_rows import LOWEST, TAIL_BYTES, WIDEST, decode_int8, encode_int8, scales_and_offsets
from embedding_store.release import CHECK_BYTES, Codec, TableInfo

if sys.byteorder != "little":
    raise ImportError("embedding_store reads rows in place and needs a little-endian host")

CODECS: tuple[Codec, ...] = ("fp32", "fp16", "int8")
_FLOATS: dict[str, np.dtype[np.generic]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
_HOLDS = {
    "fp32": f"values within ±{float(np.finfo(np.float32).max):g}",
    "fp16": "values within ±65504",
    "int8": f"rows of values from {LOWEST:g} on that reach over {WIDEST:g} at most",
}

# A Redis string of n ≥ 256 bytes takes n + 6 (5 of header, 1 terminator). jemalloc's class is 8,192 bytes and the
# next one 10,240, so one byte more would waste a fifth of every page.
_SIZE_CLASS = 8192
_STRING_OVERHEAD = 6
_BUCKET_BYTES = 1400

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


def check_codec(codec: str) -> Codec:
    """Raises InvalidRelease."""
    for known in CODECS:
        if codec == known:
            return known
    raise InvalidRelease(f"row codec {codec!r} is unknown; accepted: {', '.join(CODECS)}")


def row_bytes(codec: Codec, dim: int) -> int:
    if check_codec(codec) == "int8":
        return dim + TAIL_BYTES
    return dim * _FLOATS[codec].itemsize


def page_rows(row_bytes: int) -> int:
    """The most rows, with their checks, whose string stays in the 8 KiB allocation class: 62 of 128 bytes; a huge row
    has its own page."""
    return max(1, (_SIZE_CLASS - _STRING_OVERHEAD) // (row_bytes + CHECK_BYTES))


def bucket_rows(row_bytes: int) -> int:
    """Rows of a bucket of a sparse table on average: 10 of 128 bytes. One look-up reads a whole bucket, and each costs
    Redis some 120 bytes beside the allocator's rounding: 1.26 x the row bytes; 8 rows take 1.27, 12 take 1.24."""
    return max(1, _BUCKET_BYTES // (row_bytes + CHECK_BYTES + 8))


def encode(codec: Codec, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 [n, dim] -> uint8 [n, row_bytes], without looking at the values: see `encode_table`."""
    if rows.ndim != 2:
        raise ValueError(f"rows must be [n, dim], not {rows.shape}")
    if check_codec(codec) == "int8":
        return encode_int8(rows)
    return np.ascontiguousarray(rows, dtype=_FLOATS[codec]).view(np.uint8)


def decode(codec: Codec, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [n, row_bytes] -> float32 [n, dim]."""
    if check_codec(codec) == "int8":
        return decode_int8(rows)
    return np.ascontiguousarray(rows).view(_FLOATS[codec]).astype(np.float32)


def encode_table(
    table: str, codec: Codec, rows: NDArray[np.float32], ids: range | NDArray[np.int64]
) -> NDArray[np.uint8]:
    """As `encode`, for the rows of these ids of `table`.

    Raises InvalidRelease naming table and id of the first row that has NaN or infinities, or that the codec cannot
    hold.
    """
    with np.errstate(over="ignore"):  # what counts is the encoded value: rounding may bring one down to the limit
        encoded = encode(codec, rows)
    floats = scales_and_offsets(encoded) if codec == "int8" else encoded.view(_FLOATS[codec])
    finite = np.isfinite(floats)
    if not finite.all():
        row = int(np.argmin(finite.all(axis=1)))
        raise _refused(f"table {table!r}: id {int(ids[row])}", codec, rows[row])
    return encoded


def _refused(where: str, codec: Codec, row: NDArray[np.float32]) -> InvalidRelease:
    finite = np.isfinite(row)
    if not finite.all():
        column = int(np.argmin(finite))
        return InvalidRelease(f"{where}, column {column} is {row[column]:g}; rows must be finite")
    return InvalidRelease(
        f"{where} has values from {row.min():g} to {row.max():g}; {codec} holds {_HOLDS[codec]}: use the row codec fp32"
    )


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
