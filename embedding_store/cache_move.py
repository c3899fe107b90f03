"""Sets of the hot-id cache moved, merged and split in place."""

from __future__ import annotations

import numpy as np
from numba import njit

from embedding_store.cache_columns import (
    ENTRIES,
    EVICTIONS,
    HELD_BY,
    HELD_SALT,
    HELD_SPARSE,
    PLACE_BITS,
    SETS,
    SIZE,
    START,
    WIDTH,
)
from embedding_store.cache_memory import copy, load8, load32, load64, store8
from embedding_store.cache_set import (
    ABSENT_WAYS,
    OWNERS,
    PROBATION,
    ROWS,
    USES,
    WAYS,
    make_newest,
    order_of,
    put_bit,
    put_entry,
    set_number,
)


@njit(cache=True, nogil=True)
def move(memory, old, start, sets, owners, written):  # type: ignore[no-untyped-def]
    """Fills `sets` sets from byte `start` on with the entries of `old`, a row of `classes`; they may overlap where both
    are not fewer or both not more than before: going up or down, no set is written over before it was read."""
    built = np.zeros(old[SIZE], np.uint8)
    down = start > old[START] or sets > old[SETS]
    for step in range(sets):
        number = sets - 1 - step if down else step
        entries = _merge(memory, old, number, sets, owners, built)
        place = start + number * old[SIZE]
        if entries or place < written:
            copy(memory, place, built, 0, old[SIZE] if entries else ROWS)


@njit(cache=True, nogil=True)
def _merge(memory, old, number, sets, owners, built):  # type: ignore[no-untyped-def]
    """Builds the set `number` of `sets` out of the old sets whose hashes it has; returns its entries."""
    built[:ROWS] = 0
    entries = 0
    for source in range(number * old[SETS] // sets, -(-(number + 1) * old[SETS] // sets)):
        at = old[START] + source * old[SIZE]
        order = order_of(memory, at)
        for place in range(WAYS):
            way = (order >> (4 * place)) & 7
            key, owner = load64(memory, at + 8 * way), load32(memory, at + OWNERS + 4 * way)
            held = owners[owner & ((1 << PLACE_BITS) - 1)]
            if owner == 0 or held[HELD_BY] != owner:
                continue
            if set_number(key, held[HELD_SALT], held[HELD_SPARSE], sets) == number:
                entries = _put(memory, at, way, built, entries, owners, old[WIDTH])
    return entries


@njit(cache=True, nogil=True)
def _put(memory, at, way, built, entries, owners, width):  # type: ignore[no-untyped-def]
    """An entry into a set that has `entries` so far, or in place of the least used; returns how many it has then."""
    to = entries
    if entries == WAYS:
        to = 0
        for other in range(1, WAYS):
            to = other if _rank(built, 0, other) < _rank(built, 0, to) else to
        better = _rank(memory, at, way) > _rank(built, 0, to)
        loser = load32(built, OWNERS + 4 * to) if better else load32(memory, at + OWNERS + 4 * way)
        held = owners[loser & ((1 << PLACE_BITS) - 1)]
        held[ENTRIES] -= 1
        held[EVICTIONS] += 1
        if not better:
            return entries
    put_entry(
        built, 0, to, load64(memory, at + 8 * way), load32(memory, at + OWNERS + 4 * way),
        (load8(memory, at + ABSENT_WAYS) >> way) & 1,
    )  # fmt: skip
    put_bit(built, PROBATION, to, (load8(memory, at + PROBATION) >> way) & 1)
    store8(built, USES + to, load8(memory, at + USES + way))
    make_newest(built, 0, to)
    copy(built, ROWS + to * width, memory, at + ROWS + way * width, width)
    return min(entries + 1, WAYS)


@njit(cache=True, nogil=True, inline="always")
def _rank(memory, at, way):  # type: ignore[no-untyped-def]
    """Of an entry among those that cannot all stay: absent ids first to go, then those on probation, then by use."""
    absent, probation = (load8(memory, at + ABSENT_WAYS) >> way) & 1, (load8(memory, at + PROBATION) >> way) & 1
    return 8 * (1 - absent) + 2 * load8(memory, at + USES + way) + 1 - probation
