"""Kernels that read rows of many mapped tables in one call: entering a call takes longer than reading a few rows.

System calls are made from within, without the interpreter: `lseek` tells a file's size, `posix_fadvise` starts reading
a page of it, `getrusage` tells whether anything was read from disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from embedding_store.lookup import ABSENT, FOUND, UNAVAILABLE
from embedding_store.release import CHECK_BYTES
from embedding_store.row_checks import check_at, is_intact, row_check
from embedding_store.sparse import NOT_THERE, expected_row, find_row, mix

# Columns of the int64 [tables, COLUMNS] that describes mapped tables: their files (descriptor, address of the mapping,
# size in bytes) and rows; WIDTH: bytes of an encoded row; SEED: of its check, the bits. IDS_FILE is -1 for dense ids,
# FILE is -1 for a table that is not mapped.
FILE, ADDRESS, SIZE, IDS_FILE, IDS_ADDRESS, IDS_SIZE, ROWS, WIDTH, SEED = range(9)
COLUMNS = 9

_PAGE = 4096  # of memory; where a system's pages are larger, some are asked for twice
_SEEK_END = 2
_WILL_NEED = 3
_THREAD = 1  # RUSAGE_THREAD
_BLOCKS_READ = 11  # place of ru_inblock in struct rusage, as 64-bit words
_USAGE_WORDS = 18

_lseek: Any = types.ExternalFunction("lseek", types.int64(types.int32, types.int64, types.int32))
_fadvise: Any = types.ExternalFunction("posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32))
_getrusage: Any = types.ExternalFunction("getrusage", types.int32(types.int32, types.voidptr))


def _int_to_pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


_pointer: Any = intrinsic(_int_to_pointer)  # for kernels: an int64 as a pointer


@njit(cache=True, nogil=True)
def fetch_rows(
    mapped: NDArray[np.int64],
    tables: NDArray[np.int64],
    counts: NDArray[np.int64],
    ids: NDArray[np.int64],
    rows: NDArray[np.uint8],
    status: NDArray[np.uint8],
    ahead: bool,
) -> tuple[int, int, int]:
    """The rows of an IdBatch into `rows` and `status`, as in FetchedRows, out of the tables that `mapped` describes.

    `ahead`: starts reading all pages before it waits for the first. Rows of a table that is not mapped, or whose files
    do not have their size (any more), are UNAVAILABLE, and so are rows whose check is wrong. Returns the place of the
    last such table or -1, the place of the last id whose row is damaged or -1, and how many blocks of 512 bytes were
    read from disk.
    """
    blocks_before = _blocks_read()
    if ahead:
        _read_ids_ahead(mapped, tables, counts, ids)
    places = np.empty(len(ids), np.int64)
    whole = np.empty(len(tables), np.bool_)
    first = 0
    for k in range(len(tables)):
        table, last = mapped[tables[k]], first + counts[k]
        whole[k] = counts[k] == 0 or _is_whole(table)
        if whole[k]:
            _find(table, ids[first:last], places[first:last])
            if ahead:
                _read_rows_ahead(table, places[first:last])
        first = last
    lost, damaged = _take_all(mapped, tables, counts, ids, places, whole, rows, status)
    return lost, damaged, _blocks_read() - blocks_before


@njit(cache=True, nogil=True)
def _take_all(mapped, tables, counts, ids, places, whole, rows, status):  # type: ignore[no-untyped-def]
    """Copies everything before it looks at any check: while a row is hashed, no more than the next two are on their way
    from memory, and while it is only copied, many."""
    lost = damaged = -1
    checks = np.empty(len(ids), np.uint64)
    first = start = 0
    for k in range(len(tables)):
        table = mapped[tables[k]]
        last, end = first + counts[k], start + counts[k] * table[WIDTH]
        if whole[k]:
            bad = take_rows(
                table, ids[first:last], places[first:last], rows[start:end], checks[first:last], status[first:last]
            )
            damaged = first + bad if bad >= 0 else damaged
        # Once more: where a file was cut off meanwhile, the rest of its last page reads as zeros.
        if counts[k] and not (whole[k] and _is_whole(table)):
            status[first:last] = UNAVAILABLE
            lost = tables[k]
        first, start = last, end
    first, address = 0, np.int64(rows.ctypes.data)
    for k in range(len(tables)):
        width, seed, last = mapped[tables[k], WIDTH], np.uint64(mapped[tables[k], SEED]), first + counts[k]
        for i in range(first, last):
            if status[i] == FOUND and row_check(seed, ids[i], address, width) != checks[i]:
                status[i] = UNAVAILABLE
                damaged = i
            address += width
        first = last
    return lost, damaged


@njit(cache=True, nogil=True)
def _find(table, ids, places):  # type: ignore[no-untyped-def]
    rows = table[ROWS]
    if table[IDS_FILE] < 0:
        for i in range(len(ids)):
            places[i] = ids[i] if 0 <= ids[i] < rows else NOT_THERE
    else:
        known = carray(_pointer(table[IDS_ADDRESS]), (rows,), np.int64)
        for i in range(len(ids)):
            places[i] = find_row(known, ids[i])


@njit(cache=True, nogil=True)
def take_rows(table, ids, places, rows, checks, status):  # type: ignore[no-untyped-def]
    """Rows and the checks that lie behind them, which may be wrong. Returns the place of the last id of which cannot be
    said that it is absent, or -1.

    places: as they were searched for, which proves nothing: ids may have been damaged then, and mended since. Where an
    id is not proved to be absent, it is searched for once more.
    """
    width, sparse, unsure = table[WIDTH], table[IDS_FILE] >= 0, -1
    pages = carray(_pointer(table[ADDRESS]), (table[ROWS], width + CHECK_BYTES), np.uint8)
    for i in range(len(places)):
        place, proved = places[i], not sparse
        if sparse and place < 0:
            proved = _is_absent(table, ids[i], NOT_THERE - place)
            if not proved:
                place = _find_again(table, ids[i])
                proved = place < 0 and _is_absent(table, ids[i], NOT_THERE - place)
        if place >= 0:
            row, target = pages[place], rows[i * width : (i + 1) * width]
            for byte in range(width):
                target[byte] = row[byte]
            checks[i] = check_at(table[ADDRESS] + place * (width + CHECK_BYTES) + width)
            status[i] = FOUND
        elif proved:
            status[i] = ABSENT
        else:
            status[i] = UNAVAILABLE
            unsure = i
    return unsure


@njit(cache=True, nogil=True)
def _find_again(table, key):  # type: ignore[no-untyped-def]
    return find_row(carray(_pointer(table[IDS_ADDRESS]), (table[ROWS],), np.int64), key)


@njit(cache=True, nogil=True)
def _is_absent(table, key, place):  # type: ignore[no-untyped-def]
    """Whether this id lies between those before and behind a place, and they are the ids of the rows there: then it is
    none of the table's. Each is read once, for both: what it is may change at any moment."""
    width, seed, wanted = table[WIDTH], np.uint64(table[SEED]), mix(key)
    known = carray(_pointer(table[IDS_ADDRESS]), (table[ROWS],), np.int64)
    for row in range(max(0, place - 1), min(place + 1, table[ROWS])):
        neighbour = known[row]
        mixed = mix(neighbour)
        if mixed == wanted or (mixed < wanted) != (row < place):
            return False
        if not is_intact(seed, neighbour, table[ADDRESS] + row * (width + CHECK_BYTES), width):
            return False
    return True


@njit(cache=True, nogil=True)
def _read_ids_ahead(mapped, tables, counts, ids):  # type: ignore[no-untyped-def]
    """Around where each raw id is expected: two of three lie within √n / 2 places of it."""
    first = 0
    for k in range(len(tables)):
        table = mapped[tables[k]]
        around = 8 * int(np.sqrt(table[ROWS]) / 2)
        for i in range(first, first + counts[k]):
            if table[IDS_FILE] >= 0:
                expected = 8 * expected_row(ids[i], table[ROWS])
                _read_ahead(table[IDS_FILE], expected - around, expected + around)
        first += counts[k]


@njit(cache=True, nogil=True)
def _read_rows_ahead(table, places):  # type: ignore[no-untyped-def]
    stored = table[WIDTH] + CHECK_BYTES
    for i in range(len(places)):
        if places[i] >= 0:
            _read_ahead(table[FILE], places[i] * stored, (places[i] + 1) * stored - 1)
        elif table[IDS_FILE] >= 0:  # see `_is_absent`
            first, end = max(0, NOT_THERE - places[i] - 1), min(NOT_THERE - places[i] + 1, table[ROWS])
            _read_ahead(table[FILE], first * stored, end * stored - 1)


@njit(cache=True, nogil=True)
def _read_ahead(file, first_byte, last_byte):  # type: ignore[no-untyped-def]
    start = max(0, first_byte) // _PAGE * _PAGE
    _fadvise(np.int32(file), start, (last_byte // _PAGE + 1) * _PAGE - start, np.int32(_WILL_NEED))


@njit(cache=True, nogil=True)
def _is_whole(table):  # type: ignore[no-untyped-def]
    """Touching what a mapped file does not have (any more) would kill the process."""
    if table[FILE] < 0 or _lseek(np.int32(table[FILE]), 0, np.int32(_SEEK_END)) != table[SIZE]:
        return False
    return table[IDS_FILE] < 0 or _lseek(np.int32(table[IDS_FILE]), 0, np.int32(_SEEK_END)) == table[IDS_SIZE]


@njit(cache=True, nogil=True)
def _blocks_read():  # type: ignore[no-untyped-def]
    """By this thread, as long as it lives."""
    usage = np.zeros(_USAGE_WORDS, np.int64)
    _getrusage(np.int32(_THREAD), usage.ctypes)
    return usage[_BLOCKS_READ]
