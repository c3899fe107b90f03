"""How one byte budget is divided over row widths, and how sets move when it is divided anew.

All tables with rows of one width share sets: which of them gets how many entries is decided by use. Widths share
nothing but the budget, in proportion to the bytes of their tables.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from embedding_store.cache_columns import DUEL, SETS, SIZE, START, WIDTH
from embedding_store.cache_move import move
from embedding_store.cache_set import WAYS, set_bytes
from embedding_store.release import ReleaseManifest

# Entries per way of a cache that has room for all rows: dense ids fill sets evenly, sparse ones at random. Then 1.0 and
# 0.98 of the rows find a place (tests/embedding_store/test_cache_layout.py).
_DENSE_LOAD = 0.9
_SPARSE_LOAD = 0.6

_GOOD_ENOUGH = 0.875  # of its part: nothing is moved for the sake of less


def divide(need: Mapping[int, int], budget: int) -> dict[int, int]:
    """Bytes per key, at most `budget` in all: what each needs where that fits, else in proportion to it, after the
    small ones (which would gain nothing from a fraction) got all of theirs."""
    if sum(need.values()) <= budget:
        return dict(need)
    small = {key for key, size in need.items() if size <= budget // (4 * len(need))}
    left = budget - sum(need[key] for key in small)
    large = sum(size for key, size in need.items() if key not in small)
    return {key: size if key in small else left * size // large for key, size in need.items()}


def _need(manifest: ReleaseManifest) -> Counter[int]:
    """Bytes by width in which all rows of a release find a place."""
    need: Counter[int] = Counter()
    for table in manifest.tables:
        load = WAYS * (_SPARSE_LOAD if table.sparse else _DENSE_LOAD)
        need[table.row_bytes] += int(np.ceil(table.rows / load)) * set_bytes(table.row_bytes)
    return need


def plan(releases: Iterable[ReleaseManifest], budget: int) -> dict[int, int]:
    """Sets by width. A model counts once however many of its releases live, so that a new one moves nothing; what is
    left of the budget then goes to releases beside each other."""
    beside: Counter[int] = Counter()
    models: dict[str, Counter[int]] = {}
    for manifest in releases:
        need = _need(manifest)
        beside += need
        models[manifest.model] = models.get(manifest.model, Counter()) | need  # the larger of both, by width
    once = sum(models.values(), Counter[int]())
    share = divide(once, budget)
    more = divide(beside - once, budget - sum(share.values()))
    return {width: (size + more.get(width, 0)) // set_bytes(width) for width, size in share.items()}


class Layout:
    """The cache's memory and which part of it has sets of which width. Its callers keep readers and writers away."""

    def __init__(self, budget: int) -> None:
        # Zeros on a page boundary, which take no memory before they are written to.
        pages = mmap.mmap(-1, max(1, budget), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = np.frombuffer(pages, np.uint8, count=budget)
        self.classes = np.zeros((0, 5), np.int64)
        self._written = 0  # bytes: beyond them are zeros

    @property
    def bytes(self) -> int:
        return int((self.classes[:, SETS] * self.classes[:, SIZE]).sum())

    @property
    def entries(self) -> int:
        """As many as there can be."""
        return int(self.classes[:, SETS].sum()) * WAYS

    def class_of(self, width: int) -> int:
        """Row of `classes`, which a width keeps for good."""
        found = np.flatnonzero(self.classes[:, WIDTH] == width)
        if len(found):
            return int(found[0])
        self.classes = np.vstack([self.classes, np.array([0, 0, set_bytes(width), width, 0])])
        return len(self.classes) - 1

    def fits(self, sets: Mapping[int, int]) -> bool:
        """Whether every width has its part, or nearly."""
        has = {int(row[WIDTH]): int(row[SETS]) for row in self.classes}
        return all(has.get(width, 0) >= _GOOD_ENOUGH * wanted for width, wanted in sets.items())

    def divide_anew(self, sets: Mapping[int, int], owners: NDArray[np.int64]) -> None:
        """Gives each width its sets and keeps the entries, the most used ones where they become too many.

        In place, for there is no memory beside the budget: all shrink first and move to the front, then all move to
        where they belong and grow, the last one first.
        """
        for width in sets:
            self.class_of(width)
        wanted = np.array([sets.get(int(width), 0) for width in self.classes[:, WIDTH]], np.int64)
        smaller = np.minimum(wanted, self.classes[:, SETS])
        for row in range(len(wanted)):
            self._move(row, self._starts(smaller)[row], smaller[row], owners)
        for row in reversed(range(len(wanted))):
            self._move(row, self._starts(wanted)[row], wanted[row], owners)

    def _starts(self, sets: NDArray[np.int64]) -> NDArray[np.int64]:
        sizes = sets * self.classes[:, SIZE]
        starts: NDArray[np.int64] = np.cumsum(sizes) - sizes
        return starts

    def _move(self, row: int, start: int, sets: int, owners: NDArray[np.int64]) -> None:
        if (start, sets) != (self.classes[row, START], self.classes[row, SETS]):
            move(self.memory, self.classes[row], start, sets, owners, self._written)
            self.classes[row, [START, SETS, DUEL]] = start, sets, 0
            self._written = max(self._written, start + sets * int(self.classes[row, SIZE]))
