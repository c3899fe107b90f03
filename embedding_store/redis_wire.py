"""What goes over the wire to a Redis node, by kernels: commands that ask for pages, replies read straight into rows.

A fetch is k commands, each for one page and the ids wanted of it (arrays of `redis_fetch.PageFetch`); a node gets some
of them, `commands` int64 [m], in that order. Of a dense table, `GETRANGE <key> <first byte> <last byte>` asks for one
row; of a sparse one, `GET <key>` for a bucket (`buckets.py`) with the rows of one id or several.

redis-py packs a pipeline of 10,000 GETRANGE eight times slower than the server answers it, and every reply it gives is
a Python object; here nothing is done per row outside of a kernel.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from embedding_store.buckets import find_in_bucket
from embedding_store.lookup import ABSENT, FOUND
from embedding_store.release import CHECK_BYTES
from embedding_store.row_checks import is_intact
from embedding_store.sparse import NOT_THERE

# columns of `geometry`, int64 [tables, 6]; PAGES: buckets of a sparse table; SEED: of the rows' checks
ROWS, PAGE_ROWS, ROW_BYTES, SPARSE, PAGES, SEED = 0, 1, 2, 3, 4, 5
# Outcome of a command. LOST: the page is missing; DAMAGED: it is shorter than it was, or a row has not its check, while
# others of a bucket may have come; REFUSED: an error reply
WAITING, ANSWERED, LOST, REFUSED, DAMAGED = 0, 1, 2, 3, 4

LONGEST_COMMAND = 256  # bytes, without the key's prefix
_GETRANGE = np.frombuffer(b"*4\r\n$8\r\nGETRANGE\r\n", np.uint8)
_GET = np.frombuffer(b"*2\r\n$3\r\nGET\r\n", np.uint8)
_ASKING = np.frombuffer(b"*1\r\n$6\r\nASKING\r\n", np.uint8)


_TEN = np.uint64(10)  # numbers are divided unsigned: half the work


@njit(cache=True, nogil=True, inline="always")
def _digits(number):  # type: ignore[no-untyped-def]
    left, count = np.uint64(number), 1
    while left >= _TEN:
        left //= _TEN
        count += 1
    return count


@njit(cache=True, nogil=True, inline="always")
def _put(buffer, at, content):  # type: ignore[no-untyped-def]
    target = buffer[at : at + len(content)]  # places in a view are not negative, which lets the compiler use vectors
    for place in range(len(content)):
        target[place] = content[place]
    return at + len(content)


@njit(cache=True, nogil=True, inline="always")
def _put_number(buffer, at, number, digits):  # type: ignore[no-untyped-def]
    """Decimal without leading zeros, which Redis refuses, and the end of the line."""
    target, left = buffer[at : at + digits + 2], np.uint64(number)
    for place in range(digits - 1, -1, -1):
        target[place] = np.uint64(48) + left % _TEN
        left //= _TEN
    target[digits] = 13
    target[digits + 1] = 10
    return at + digits + 2


@njit(cache=True, nogil=True, inline="always")
def _put_length(buffer, at, length):  # type: ignore[no-untyped-def]
    buffer[at] = 36  # $
    return _put_number(buffer, at + 1, length, _digits(length))


@njit(cache=True, nogil=True, inline="always")
def _put_argument(buffer, at, number):  # type: ignore[no-untyped-def]
    digits = _digits(number)
    return _put_number(buffer, _put_length(buffer, at, digits), number, digits)


@njit(cache=True, nogil=True)
def encode(  # type: ignore[no-untyped-def]
    commands, first, most, asking, tables, pages, begins, members, ids, prefixes, ends, geometry, buffer
):
    """Writes commands[first:], `most` at most and as many as fit; returns the first one left out and the bytes used.

    asking: before each one ASKING, which a node wants where a slot is just moving to it.
    """
    at, last = 0, min(len(commands), first + most)
    while first < last:
        command = commands[first]
        table, page = tables[command], pages[command]
        prefix = prefixes[ends[table] : ends[table + 1]]
        if at + len(prefix) + LONGEST_COMMAND > len(buffer):
            break
        if asking:
            at = _put(buffer, at, _ASKING)
        at = _put(buffer, at, _GET if geometry[table, SPARSE] else _GETRANGE)
        digits = _digits(page)
        at = _put_length(buffer, at, len(prefix) + digits)
        at = _put_number(buffer, _put(buffer, at, prefix), page, digits)
        if not geometry[table, SPARSE]:
            width = geometry[table, ROW_BYTES] + CHECK_BYTES
            start = (ids[members[begins[command]]] - page * geometry[table, PAGE_ROWS]) * width
            at = _put_argument(buffer, at, start)
            at = _put_argument(buffer, at, start + width - 1)
        first += 1
    return first, at


@njit(cache=True, nogil=True, inline="always")
def _line_end(buffer, at, end):  # type: ignore[no-untyped-def]
    """Where the line's CR LF begins; -1 where it is not all there."""
    while at + 1 < end:
        if buffer[at] == 13 and buffer[at + 1] == 10:
            return at
        at += 1
    return -1


@njit(cache=True, nogil=True, inline="always")
def _number(buffer, at, end):  # type: ignore[no-untyped-def]
    """Decimal, -1 for a null, -2 for what is neither."""
    if end - at == 2 and buffer[at] == 45 and buffer[at + 1] == 49:
        return -1
    number = 0 if 0 < end - at < 10 else -2
    for place in range(at, end):
        digit = buffer[place] - 48
        number = number * 10 + digit if number >= 0 and 0 <= digit <= 9 else -2
    return number


@njit(cache=True, nogil=True, inline="always")
def _take_row(buffer, start, width, position, targets, rows, status):  # type: ignore[no-untyped-def]
    target, row = rows[targets[position] : targets[position] + width], buffer[start : start + width]
    for byte in range(width):
        target[byte] = row[byte]
    status[position] = FOUND


@njit(cache=True, nogil=True)
def _take_from_bucket(  # type: ignore[no-untyped-def]
    buffer, address, start, length, width, seed, bucket, members, ids, targets, rows, status
):
    """The rows of some ids, at these places, out of their bucket; returns the outcome."""
    outcome = ANSWERED
    for i in range(len(members)):
        position = members[i]
        key = ids[position]
        row = find_in_bucket(address + start, length, key, width + CHECK_BYTES, seed, bucket)
        if row >= 0 and is_intact(seed, key, address + start + row, width):
            _take_row(buffer, start + row, width, position, targets, rows, status)
        elif row == NOT_THERE:
            status[position] = ABSENT
        else:
            outcome = DAMAGED
    return outcome


@njit(cache=True, nogil=True)
def decode(  # type: ignore[no-untyped-def]
    buffer, at, end, commands, replies, asking,
    tables, pages, begins, members, ids, targets, geometry, rows, status, outcome, errors,
):  # fmt: skip
    """Reads the replies in buffer[at:end] that are whole, as many as belong to `commands`, beyond the `replies` that
    were read before.

    Puts rows where they belong. Error replies go to errors, int64 [e, 3]: command, begin and end of the line; stops
    where that is full. Returns what `at` and `replies` are now, the number of errors, and whether all was in order: a
    reply that cannot belong to a command means that the rest cannot be told apart.
    """
    found, each, address = 0, 2 if asking else 1, np.int64(buffer.ctypes.data)
    while replies < each * len(commands) and found < len(errors):
        line = _line_end(buffer, at + 1, end)
        if line < 0:
            break
        kind = buffer[at]
        command = commands[replies // each]
        if kind == 45:  # -
            errors[found, 0], errors[found, 1], errors[found, 2] = command, at + 1, line
            outcome[command] = REFUSED
            found += 1
            at = line + 2
        elif asking and replies % 2 == 0:
            if kind != 43:  # +OK
                return at, replies, found, False
            at = line + 2
        else:
            length, start = _number(buffer, at + 1, line), line + 2
            table = tables[command]
            width, sparse, seed = geometry[table, ROW_BYTES], geometry[table, SPARSE], np.uint64(geometry[table, SEED])
            if kind != 36 or length < -1 or (length > width + CHECK_BYTES and not sparse):
                return at, replies, found, False
            after = start + length + 2 if length >= 0 else start
            if after > end:
                break
            if length <= 0:  # GETRANGE answers "" for a page that is not there, and for a row behind its end
                outcome[command] = LOST
            elif sparse:
                wanted = members[begins[command] : begins[command + 1]]
                outcome[command] = _take_from_bucket(
                    buffer, address, start, length, width, seed, pages[command], wanted, ids, targets, rows, status
                )
            else:
                position = members[begins[command]]
                good = length == width + CHECK_BYTES and is_intact(seed, ids[position], address + start, width)
                if good:  # or a row that came before, of another node, stays
                    _take_row(buffer, start, width, position, targets, rows, status)
                outcome[command] = ANSWERED if good else DAMAGED
            at = after
        replies += 1
    return at, replies, found, True
