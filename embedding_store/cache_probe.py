"""Reading the hot-id cache: one call for all tables of a look-up, without a lock."""

from __future__ import annotations

import numpy as np
from numba import njit

from embedding_store.cache_columns import (
    ABSENTS,
    CLASS,
    HELD_BY,
    HITS,
    MISSES,
    OWNER,
    PLACE,
    SALT,
    SETS,
    SIZE,
    SPARSE,
    START,
    WIDTH,
)
from embedding_store.cache_memory import add_atomic, copy, fence_acquire, load8, prefetch
from embedding_store.cache_policy import touch
from embedding_store.cache_set import ABSENT_WAYS, ALIGN, ROWS, changed, set_number, version_of, way_of

_BLOCK = 64  # ids between the passes: their sets and rows stay in the first cache
_TRIES = 4


@njit(cache=True, nogil=True)
def probe(  # type: ignore[no-untyped-def]
    memory, classes, owners, policy, tables, asked, counts, ids, out, starts, status, misses, record
):
    """Writes hits to out and status and the positions of the others to misses; returns how many. See HotCache.probe."""
    found = np.empty((4, _BLOCK), np.int64)
    first = missed = 0
    for k in range(len(asked)):
        table, last = tables[asked[k]], first + counts[k]
        sets = classes[table[CLASS]]
        missed_before, absent, to = missed, 0, starts[k]
        for begin in range(first, last, _BLOCK):
            if sets[SETS] == 0:
                missed = _miss_all(begin, last, misses, missed)
                break
            end = min(begin + _BLOCK, last)
            _find(memory, sets, table, ids[begin:end], found)
            missed, absents = _take(
                memory, policy, table[OWNER], ids, begin, end, found, sets[WIDTH], out, to,
                status, misses, missed, record,
            )  # fmt: skip
            absent += absents
            to += (end - begin) * sets[WIDTH]
        if record and counts[k]:
            _count(owners[table[PLACE]], table[OWNER], counts[k], missed - missed_before, absent)
        first = last
    return missed


@njit(cache=True, nogil=True)
def _miss_all(begin, end, misses, missed):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        misses[missed] = i
        missed += 1
    return missed


@njit(cache=True, nogil=True)
def _find(memory, sets, table, ids, found):  # type: ignore[no-untyped-def]
    """The first of two passes, tags and then rows: half the time of one, because the processor has more fetches from
    memory under way. found: where the set of each id begins, its version, the way or -1, and 1 for an absent id."""
    start, count, size = sets[START], sets[SETS], sets[SIZE]
    owner, salt, sparse, width = table[OWNER], table[SALT], table[SPARSE], sets[WIDTH]
    for i in range(len(ids)):
        at = start + set_number(ids[i], salt, sparse, count) * size
        found[0, i] = at
        prefetch(memory, at)
        prefetch(memory, at + ALIGN)
    for i in range(len(ids)):
        at = found[0, i]
        found[1, i] = version_of(memory, at)
        way = way_of(memory, at, ids[i], owner)
        found[2, i] = way
        found[3, i] = (load8(memory, at + ABSENT_WAYS) >> (way & 7)) & 1
        prefetch(memory, at + ROWS + (way & 7) * width)


@njit(cache=True, nogil=True)
def _take(  # type: ignore[no-untyped-def]
    memory, policy, owner, ids, begin, end, found, width, out, to, status, misses, missed, record
):
    """The second pass, over ids[begin:end]. Returns the misses so far, and how many of these ids are absent."""
    absents = 0
    for i in range(begin, end):
        at, way = found[0, i - begin], found[2, i - begin]
        if way >= 0:
            copy(out, to + (i - begin) * width, memory, at + ROWS + way * width, width)
    fence_acquire()
    for i in range(begin, end):
        at, way, absent = found[0, i - begin], found[2, i - begin], found[3, i - begin]
        if changed(memory, at, found[1, i - begin]):
            way, absent = _read_again(memory, at, ids[i], owner, width, out, to + (i - begin) * width)
        if way < 0:
            misses[missed] = i
            missed += 1
            continue
        status[i] = absent  # FOUND is 0 and ABSENT 1
        absents += absent
        if record:
            touch(policy, memory, at, way)
    return missed, absents


@njit(cache=True, nogil=True)
def _read_again(memory, at, key, owner, width, out, to):  # type: ignore[no-untyped-def]
    """Way, and whether it is absent, after somebody wrote into the set; -1 for a miss, also when that goes on."""
    for _ in range(_TRIES):
        version = version_of(memory, at)
        way = way_of(memory, at, key, owner)
        if way >= 0:
            copy(out, to, memory, at + ROWS + way * width, width)
        absent = (load8(memory, at + ABSENT_WAYS) >> (way & 7)) & 1
        fence_acquire()
        if not changed(memory, at, version):
            return way, absent
    return -1, 0


@njit(cache=True, nogil=True)
def _count(place, owner, asked, missed, absent):  # type: ignore[no-untyped-def]
    if place[HELD_BY] == owner:
        add_atomic(place, HITS, asked - missed)
        add_atomic(place, MISSES, missed)
        add_atomic(place, ABSENTS, absent)
