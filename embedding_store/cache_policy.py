"""Which entry of a full set makes room: the seam at which another rule is put in.

A policy is two kernels over a set (`cache_set` has its fields): `touch` for an entry that is used, by readers and
without a lock, and `make_room`, which chooses the way for an id that came, by the one writer.

lru: the least recently used entry goes, whatever comes.

s3fifo (Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023), within each set: an id that comes for
the first time is on probation, with one way of eight; it stays when it is used there, or when it comes back while its
fingerprint is remembered. The others are a queue in which an entry that was used goes round again. A hit is a
counter of two bits, written three times at most. That holds what is frequent, and lags when everything changes at once:
so sets duel (Qureshi et al., Adaptive insertion policies, ISCA 2007). Of 64 sets, one lets every id in and gives used
entries one more round (CLOCK, nearly LRU), one keeps to S3-FIFO, and the others do as the one that misses less.
"""

from __future__ import annotations

from numba import njit

from embedding_store.cache_memory import count_bits, load8, load32, load64, store8
from embedding_store.cache_set import (
    ABSENT_WAYS,
    OWNERS,
    PROBATION,
    USES,
    WAYS,
    fingerprint,
    make_newest,
    make_oldest,
    oldest,
    put_bit,
    recall,
    remember,
)

LRU, S3FIFO = 0, 1
POLICIES = {"lru": LRU, "s3fifo": S3FIFO}

EVICTED, REJECTED = 1, 2  # what became of the entry that made room: REJECTED where it was on probation
MOST_ABSENT = 2  # ways of 8: ids that do not exist may take a quarter of the cache, not more

_MOST_USES = 3
_ALL = 255
_DUEL_SETS = 64
_DUEL_LIMIT = 512  # misses: a longer lead is not remembered, or it would take too long to lose


@njit(cache=True, nogil=True, inline="always")
def touch(policy, memory, at, way):  # type: ignore[no-untyped-def]
    """An entry is used. Races with other readers lose a use at worst."""
    if policy == LRU:
        make_newest(memory, at, way)
        return
    uses = load8(memory, at + USES + way)
    if uses < _MOST_USES:  # it need not be written again and again: that would take the line from other processors
        store8(memory, at + USES + way, uses + 1)


@njit(cache=True, nogil=True)
def make_room(policy, memory, at, number, duel, key, owner, absent):  # type: ignore[no-untyped-def]
    """A way of the full set `number`, which begins at byte `at`, for an id that is not there, and what its entry was:
    EVICTED or REJECTED. duel: int64 [1], by how much S3-FIFO leads; `absent`: the table does not have the id."""
    absents = load8(memory, at + ABSENT_WAYS)
    crowded = absent and count_bits(absents) >= MOST_ABSENT
    if policy == LRU:
        return oldest(memory, at, absents if crowded else _ALL), EVICTED
    by_clock = _duel(number, duel)
    known = recall(memory, at, fingerprint(key, owner))
    way = oldest(memory, at, absents) if crowded else _s3fifo(memory, at, known, by_clock)
    on_probation = (load8(memory, at + PROBATION) >> way) & 1
    if on_probation or by_clock:
        remember(memory, at, fingerprint(load64(memory, at + 8 * way), load32(memory, at + OWNERS + 4 * way)))
    put_bit(memory, at + PROBATION, way, not known and not by_clock)
    return way, REJECTED if on_probation else EVICTED


@njit(cache=True, nogil=True)
def settle(memory, at, way, warming):  # type: ignore[no-untyped-def]
    """Gives an entry that was put into `way` its place: not used yet, the newest, or, as warming goes from hot to cold,
    the oldest."""
    store8(memory, at + USES + way, 0)
    if warming:
        make_oldest(memory, at, way)
    else:
        make_newest(memory, at, way)


@njit(cache=True, nogil=True, inline="always")
def _duel(number, duel):  # type: ignore[no-untyped-def]
    """Counts a miss in a set that leads; whether the set goes by CLOCK."""
    side = number % _DUEL_SETS
    if side == 0:
        duel[0] = min(duel[0] + 1, _DUEL_LIMIT)
    elif side == 1:
        duel[0] = max(duel[0] - 1, -_DUEL_LIMIT)
    return side == 0 or (side != 1 and duel[0] < 0)


@njit(cache=True, nogil=True)
def _s3fifo(memory, at, known, by_clock):  # type: ignore[no-untyped-def]
    """The way to free. Used entries that are passed over stay and become the newest; CLOCK looks at all ways alike."""
    way = 0
    for _ in range((_MOST_USES + 1) * WAYS):  # readers may use entries meanwhile: it ends all the same
        probation = load8(memory, at + PROBATION)
        from_probation = not by_clock and count_bits(probation) > known
        way = oldest(memory, at, _ALL if by_clock else probation if from_probation else ~probation)
        uses = load8(memory, at + USES + way)
        if uses == 0:
            break
        store8(memory, at + USES + way, 0 if by_clock or from_probation else uses - 1)
        put_bit(memory, at + PROBATION, way, False)
        make_newest(memory, at, way)
    return way
