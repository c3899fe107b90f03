"""The checks of rows by plain integers, out of the formula in `row_checks.py`; shares no code with it."""

from __future__ import annotations

import hashlib

from embedding_store.release import TableInfo

ALL = 2**64 - 1
M, B, C, D = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD


def seed(name: str, codec: str, dim: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name}\n{codec}\n{dim}".encode()).digest()[:8], "little")


def step(h: int, word: int) -> int:
    product = (h ^ word) * M
    return product & ALL ^ product >> 64


def check(seed: int, key: int, content: bytes) -> int:
    h = step(seed, key & ALL)
    lanes = [h, h ^ B, h ^ C, h ^ D]
    words = [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content) // 8 * 8, 8)]
    fours = len(words) // 4 * 4
    for place, word in enumerate(words[:fours]):
        lanes[place % 4] = step(lanes[place % 4], word)
    rest = words[fours:]
    if len(content) % 8:
        rest.append(int.from_bytes(content[-8:], "little"))
    for word in rest:
        lanes[0] = step(lanes[0], word)
    a, b, c, d = lanes
    return ((step(step(step(step(a, 0), b), c), d) * B & ALL) >> 48) or 1


def stored(table: TableInfo, key: int, row: bytes) -> bytes:
    return row + check(seed(table.name, table.codec, table.dim), key, row).to_bytes(2, "little")


def bucket(table: TableInfo, number: int, rows: dict[int, bytes]) -> bytes:
    """Of these ids and encoded rows, in this order."""
    head = len(rows).to_bytes(4, "little") + b"".join(key.to_bytes(8, "little", signed=True) for key in rows)
    of_ids = check(~seed(table.name, table.codec, table.dim) & ALL, number, head)
    return of_ids.to_bytes(2, "little") + head + b"".join(stored(table, key, row) for key, row in rows.items())
