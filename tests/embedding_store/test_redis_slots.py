"""Slots of keys, slot maps and redirections, without a server."""

from __future__ import annotations

import numpy as np
import pytest
from redis.crc import key_slot

from embedding_store.redis_slots import SLOTS, page_slots, redirection, slot_map


@pytest.mark.parametrize("seed", range(3))
def test_slots_are_those_of_redis_py(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"{'x' * int(rng.integers(1, 40))}:{number}:" for number in range(3)]
    tables = np.sort(rng.integers(0, 3, 500))
    pages = rng.integers(0, 10 ** rng.integers(1, 12, 500))
    ends = np.cumsum([0, *map(len, names)])
    slots = np.empty(500, np.int64)
    page_slots(tables, pages, np.frombuffer("".join(names).encode(), np.uint8), ends, slots)
    keys = [f"{names[table]}{page}".encode() for table, page in zip(tables.tolist(), pages.tolist(), strict=True)]
    assert slots.tolist() == [key_slot(key) for key in keys]


def test_slot_maps() -> None:
    reply = [
        [0, 99, [b"10.0.0.1", 7000, b"id", []], [b"", 7001, b"id", []]],
        [200, SLOTS - 1, [None, 7002, b"id"]],
        [100, 149, [b"10.0.0.1", 7000, b"id", []], [b"", 7001, b"id", []]],
    ]
    known = slot_map(reply, ("seed", 1))
    assert [known.shards[known.shard_of[slot]].master for slot in (0, 99, 100, 149, 200, SLOTS - 1)] == (
        [("10.0.0.1", 7000)] * 4 + [("seed", 7002)] * 2
    )
    assert known.shards[known.shard_of[0]].replicas == (("seed", 7001),)
    assert (known.shard_of[150:200] == -1).all()
    later = known.with_moved({150: ("seed", 7002), 0: ("new", 1)})
    assert [later.shards[later.shard_of[slot]].master for slot in (0, 1, 150)] == (
        [("new", 1), ("10.0.0.1", 7000), ("seed", 7002)]
    )
    for nonsense in (None, b"x", [[1]], [[0, 1, [b"h", b"p"]]], [["a", 2, [b"h", 1]]]):
        with pytest.raises(ValueError, match="no reply to CLUSTER SLOTS"):
            slot_map(nonsense, ("seed", 1))


def test_a_node_without_slots_is_no_answer() -> None:
    with pytest.raises(ValueError, match=r"seed:1 knows of no node that serves a slot"):
        slot_map([], ("seed", 1))


def test_redirections() -> None:
    asked = ("h", 1)
    assert redirection("MOVED 3999 127.0.0.1:6381", asked) == (3999, ("127.0.0.1", 6381))
    assert redirection("ASK 16383 ::1:6381", asked) == (16383, ("::1", 6381))
    assert redirection("MOVED 1 :6381", asked) == (1, ("h", 6381))
    assert redirection("MOVED 1 ?:6381", asked) == (1, ("h", 6381))
    for other in ("MOVED 16384 h:1", "MOVED 1", "MOVED 1 h:x", "TRYAGAIN x", "ERR MOVED 1 h:1"):
        assert redirection(other, asked) is None
