"""Writing into the hot-id cache: one call for all tables of a batch, by one writer at a time."""

from __future__ import annotations

from numba import njit

from embedding_store.cache_columns import (
    ABSENTS,
    CLASS,
    DEFAULT,
    DUEL,
    ENTRIES,
    EVICTIONS,
    HELD_BY,
    MODEL,
    OWNER,
    PLACE,
    PLACE_BITS,
    REJECTIONS,
    RELEASE,
    SALT,
    SETS,
    SIZE,
    SPARSE,
    START,
    WIDTH,
)
from embedding_store.cache_memory import copy, count_bits, load8, load32, prefetch
from embedding_store.cache_policy import EVICTED, MOST_ABSENT, make_room, settle
from embedding_store.cache_set import (
    ABSENT_WAYS,
    ALIGN,
    OWNERS,
    PROBATION,
    ROWS,
    USES,
    WAYS,
    begin_write,
    end_write,
    order_of,
    put_bit,
    put_entry,
    set_number,
    way_of,
)
from embedding_store.lookup import ABSENT, FOUND

_AHEAD = 8  # ids whose sets are under way from memory


@njit(cache=True, nogil=True)
def insert(  # type: ignore[no-untyped-def]
    memory, classes, owners, policy, tables, defaults, asked, counts, ids, rows, status, warming
):
    """Keeps what is FOUND or, unless warming, ABSENT. One writer at a time. See HotCache.insert."""
    last = FOUND if warming else ABSENT
    first = row = 0
    for k in range(len(asked)):
        table = tables[asked[k]]
        sets = classes[table[CLASS]]
        known = owners[table[PLACE], HELD_BY] == table[OWNER]
        end = first + counts[k]
        for i in range(first, end):
            if i + _AHEAD < end and sets[SETS] > 0:
                at = sets[START] + set_number(ids[i + _AHEAD], table[SALT], table[SPARSE], sets[SETS]) * sets[SIZE]
                prefetch(memory, at)
                prefetch(memory, at + ALIGN)
            absent = status[i] == ABSENT
            if known and status[i] <= last and sets[SETS] > 0:
                source, start = (defaults, table[DEFAULT]) if absent else (rows, row)
                _keep(memory, sets, owners, policy, table, ids[i], source, start, absent, warming)
            if known and absent and not warming:
                owners[table[PLACE], ABSENTS] += 1
            row += sets[WIDTH]
        first = end


@njit(cache=True, nogil=True)
def _keep(memory, sets, owners, policy, table, key, rows, row, absent, warming):  # type: ignore[no-untyped-def]
    owner = table[OWNER]
    number = set_number(key, table[SALT], table[SPARSE], sets[SETS])
    at = sets[START] + number * sets[SIZE]
    if way_of(memory, at, key, owner) >= 0:
        return  # another thread brought it meanwhile; rows of a release never change
    way, fate = _vacant(memory, at, owners, absent), EVICTED
    full = way < 0
    if full and warming:
        way = _coldest_of_others(memory, at, owners, owners[table[PLACE]])
        if way < 0:
            return
    begin_write(memory, at)
    if way < 0:
        way, fate = make_room(policy, memory, at, number, sets[DUEL:], key, owner, absent)
    else:
        put_bit(memory, at + PROBATION, way, False)
    if full:
        _let_go(memory, at, way, owners, fate)
    settle(memory, at, way, warming)
    put_entry(memory, at, way, key, owner, absent)
    copy(memory, at + ROWS + way * sets[WIDTH], rows, row, sets[WIDTH])
    end_write(memory, at)
    owners[table[PLACE], ENTRIES] += 1


@njit(cache=True, nogil=True)
def _vacant(memory, at, owners, absent):  # type: ignore[no-untyped-def]
    """An empty way, or a forgotten owner's, or -1; also where absent ids have their part of the set."""
    if absent and count_bits(load8(memory, at + ABSENT_WAYS)) >= MOST_ABSENT:
        return -1
    for way in range(WAYS):
        owner = load32(memory, at + OWNERS + 4 * way)
        if owner == 0 or _held(owners, owner)[HELD_BY] != owner:
            return way
    return -1


@njit(cache=True, nogil=True, inline="always")
def _held(owners, owner):  # type: ignore[no-untyped-def]
    """The line of its place, maybe another's by now."""
    return owners[owner & ((1 << PLACE_BITS) - 1)]


@njit(cache=True, nogil=True)
def _let_go(memory, at, way, owners, fate):  # type: ignore[no-untyped-def]
    owner = load32(memory, at + OWNERS + 4 * way)
    held = _held(owners, owner)
    if held[HELD_BY] == owner:
        held[ENTRIES] -= 1
        held[EVICTIONS if fate == EVICTED else REJECTIONS] += 1


@njit(cache=True, nogil=True)
def _coldest_of_others(memory, at, owners, mine):  # type: ignore[no-untyped-def]
    """Which entry of a full set may be displaced by warming; -1 if none.

    Never one of the release that is warmed, for its hottest rows come first, and no more than half of a set. Of an
    older release of the model the least used goes; of another model, which stays in use, only what nobody uses.
    """
    order = order_of(memory, at)
    coldest, least, own = -1, 256, 0
    for place in range(WAYS):
        way = (order >> (4 * place)) & 7
        held = _held(owners, load32(memory, at + OWNERS + 4 * way))
        uses = load8(memory, at + USES + way)
        if held[RELEASE] == mine[RELEASE]:
            own += 1
        elif uses < least and (held[MODEL] == mine[MODEL] or uses == 0):
            coldest, least = way, uses
    return coldest if own < WAYS // 2 else -1
