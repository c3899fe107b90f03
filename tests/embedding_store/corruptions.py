"""Other bytes of the same length where pages of a release were: what lengths do not tell and checks of rows must."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np

from tests.embedding_store.bundles import TestTable
from tests.embedding_store.damage import Files, Keys, Piece

# Rows of `item` and `other` are equally wide, and so are those of `raw` and `other.raw`.
TABLES = (
    TestTable("item", "fp16", rows=1500, dim=16, hot=50, default=True),
    TestTable("other", "fp32", rows=1500, dim=8, default=True),
    TestTable("raw", "fp16", rows=1500, dim=16, hot=50, default=True, sparse=True),
    TestTable("other.raw", "int8", rows=1500, dim=28, sparse=True),
)
ANOTHER = {"item": "other", "raw": "other.raw"}
Corruption = Callable[[Keys | Files, str, np.random.Generator], None]


def some(it: Keys | Files, table: str, rng: np.random.Generator, n: int = 3) -> list[Piece]:
    pieces = it.pieces(table)
    return [pieces[place] for place in rng.choice(len(pieces), min(n, len(pieces)), replace=False).tolist()]


def garbage(it: Keys | Files, table: str, rng: np.random.Generator) -> None:
    for piece in some(it, table, rng):
        it.write(piece, rng.bytes(len(it.read(piece))))


def zeros(it: Keys | Files, table: str, rng: np.random.Generator) -> None:
    for piece in some(it, table, rng):
        it.write(piece, bytes(len(it.read(piece))))


def ones(it: Keys | Files, table: str, rng: np.random.Generator) -> None:
    for piece in some(it, table, rng):
        it.write(piece, b"\xff" * len(it.read(piece)))


def flipped_bits(it: Keys | Files, table: str, rng: np.random.Generator) -> None:
    """One in each piece, of many."""
    for piece in some(it, table, rng, 20):
        content = bytearray(it.read(piece))
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        it.write(piece, bytes(content))


def swapped(it: Keys | Files, table: str, rng: np.random.Generator) -> None:
    """Two pieces of equal length."""
    contents = {piece: it.read(piece) for piece in it.pieces(table)}
    pairs = [(a, b) for a, b in combinations(contents, 2) if a.kind == b.kind and _alike(contents[a], contents[b])]
    first, second = pairs[int(rng.integers(len(pairs)))]
    it.write(first, contents[second])
    it.write(second, contents[first])


def of_another_table(it: Keys | Files, table: str, rng: np.random.Generator) -> None:
    """A piece of equal length."""
    theirs = [(piece.kind, it.read(piece)) for piece in it.pieces(ANOTHER[table])]
    ours = [(piece, it.read(piece)) for piece in it.pieces(table)]
    pairs = [(a, y) for a, x in ours for kind, y in theirs if a.kind == kind and _alike(x, y)]
    for place in rng.choice(len(pairs), 2).tolist():
        it.write(*pairs[place])


def rotated(it: Keys | Files, table: str, rng: np.random.Generator) -> None:
    """Rows of dense ids by one row, so that each is whole, in the place of its neighbour; buckets as they come."""
    width = it.manifest.table(table).stored_bytes
    for piece in some(it, table, rng):
        content = it.read(piece)
        it.write(piece, content[width:] + content[:width])


def _alike(one: bytes, other: bytes) -> bool:
    return len(one) == len(other) and one != other


CORRUPTIONS: dict[str, Corruption] = {
    one.__name__: one for one in (garbage, zeros, ones, flipped_bits, swapped, of_another_table, rotated)
}
