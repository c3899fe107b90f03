"""The check behind every stored row: 16 bits by which whoever fetches a row knows that these are its bytes.

A file with its length, a string with its length may still hold something else: garbage, zeros of a block that never was
written, a page of another place or table. The check is a hash of the row's bytes that begins with the table and the id,
so that it is wrong for the right bytes in the wrong place too; what is wrong passes once in 2^16 rows. It is never 0.

    h = step(seed, id);  a, b, c, d = h, h ^ B, h ^ C, h ^ D
    a, b, c, d take words 0, 1, 2, 3, then 4, 5, 6, 7, …; `a` takes those that are left after whole fours, and then the
    row's last 8 bytes, where its width is no multiple of 8 (of a row of less than 8: all, and zeros behind them)
    check = high 16 bits of step(step(step(step(a, 0), b), c), d) · B;  1 instead of 0
    step(h, word) = low 64 bits ^ high 64 bits of the 128 bits of (h ^ word) · M

Four hashes side by side, because a multiplication waits four cycles for the one before: 128 bytes take some 8 ns. What
a flipped bit does to a step depends on the other bits, by the carries into the high half, so that flips do not cancel
out. By x ^ x >> 32 of the low half those of highest bits, the signs of floats, did: of them both are linear.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from embedding_store.release import CHECK_BYTES, TableInfo

_M = np.uint64(0x9E3779B97F4A7C15)
_B = np.uint64(0xD6E8FEB86659FD93)
_C = np.uint64(0xC4CEB9FE1A85EC53)
_D = np.uint64(0xFF51AFD7ED558CCD)
_NOTHING, _U48 = np.uint64(0), np.uint64(48)


def table_seed(table: TableInfo) -> np.uint64:
    """The same for the same table of all releases: export does not know what will be published when."""
    return seed_of(table.name, table.codec, table.dim)


def seed_of(name: str, codec: str, dim: int) -> np.uint64:
    digest = hashlib.sha256(f"{name}\n{codec}\n{dim}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def with_checks(seed: np.uint64, ids: NDArray[np.int64], rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encoded rows uint8 [n, row_bytes] of these ids, int64 [n] -> uint8 [n, row_bytes + CHECK_BYTES], as stored."""
    checks = row_checks(seed, ids, rows).astype("<u2").view(np.uint8).reshape(-1, CHECK_BYTES)
    return np.concatenate((rows, checks), axis=1)


def row_checks(seed: np.uint64, ids: NDArray[np.int64], rows: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """uint16 [n] of the rows uint8 [n, row_bytes] that have these ids, int64 [n]."""
    checks = np.empty(len(rows), np.uint16)
    _fill(seed, ids, np.ascontiguousarray(rows), checks)
    return checks


def _load(kind: Any) -> Any:
    """For kernels: what lies at this address, aligned or not, as an unsigned integer of this type."""

    def typed(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            integer = context.get_value_type(kind)
            loaded = builder.load(builder.inttoptr(arguments[0], integer.as_pointer()))
            loaded.align = 1
            return loaded

        return kind(types.int64), generate

    return intrinsic(typed)


_byte, _pair = _load(types.uint8), _load(types.uint16)
quad_at, word_at = _load(types.uint32), _load(types.uint64)


def _folded_product(typing_context: Any, one: Any, other: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        both = ir.IntType(128)
        product = builder.mul(*(builder.zext(factor, both) for factor in arguments))
        high = builder.lshr(product, ir.Constant(both, 64))
        return builder.xor(builder.trunc(product, ir.IntType(64)), builder.trunc(high, ir.IntType(64)))

    return types.uint64(types.uint64, types.uint64), generate


_folded: Any = intrinsic(_folded_product)  # for kernels: both halves of the product of two uint64, one ^ the other


@njit(cache=True, nogil=True, inline="always")
def _step(h, word):  # type: ignore[no-untyped-def]
    return _folded(h ^ word, _M)


@njit(cache=True, nogil=True, inline="always")
def row_check(seed: np.uint64, key: np.int64, address: np.int64, width: int) -> np.uint64:
    """Of the `width` bytes at this address, as the row of id `key`.

    Kernels give addresses: for a part of an array numba would count references, which takes as long as all the rest.
    """
    a = _step(seed, np.uint64(key))
    b, c, d = a ^ _B, a ^ _C, a ^ _D
    at, end = address, address + width
    while at + 32 <= end:
        a = _step(a, word_at(at))
        b = _step(b, word_at(at + 8))
        c = _step(c, word_at(at + 16))
        d = _step(d, word_at(at + 24))
        at += 32
    while at + 8 <= end:
        a = _step(a, word_at(at))
        at += 8
    if at < end:
        if width >= 8:
            word = word_at(end - 8)
        else:
            word = np.uint64(0)
            for place in range(width):
                word |= np.uint64(_byte(address + place)) << np.uint64(8 * place)
        a = _step(a, word)
    check = (_step(_step(_step(_step(a, _NOTHING), b), c), d) * _B) >> _U48
    return check if check else np.uint64(1)


@njit(cache=True, nogil=True, inline="always")
def check_at(address: np.int64) -> np.uint64:
    return np.uint64(_pair(address))


@njit(cache=True, nogil=True, inline="always")
def is_intact(seed: np.uint64, key: np.int64, address: np.int64, width: int) -> bool:
    """Whether the row of id `key` at this address has its check behind it."""
    return bool(row_check(seed, key, address, width) == check_at(address + width))


@njit(cache=True, nogil=True)
def _fill(seed, ids, rows, checks):  # type: ignore[no-untyped-def]
    width, first = rows.shape[1], np.int64(rows.ctypes.data)
    for i in range(len(ids)):
        checks[i] = row_check(seed, ids[i], first + i * width, width)
