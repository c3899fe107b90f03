"""Which node of a Redis Cluster has which key: CRC16 slots of pages by a kernel, and the slot map that a node tells.

https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/, "Key distribution model".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embedding_store.redis_url import Host

SLOTS = 16384
_REDIRECTION = re.compile(r"(MOVED|ASK) (?P<slot>\d{1,5}) (?P<host>\S*):(?P<port>\d{1,5})")


def _crc16_table() -> NDArray[np.uint16]:
    """CRC-16/XMODEM, by byte: polynomial x^16 + x^12 + x^5 + 1, nothing reflected, begins with 0."""
    table = np.zeros(256, np.uint16)
    for byte in range(256):
        crc = byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
        table[byte] = crc
    return table


_CRC16 = _crc16_table()


@njit(cache=True, nogil=True, inline="always")
def _crc16(crc, byte):  # type: ignore[no-untyped-def]
    return ((crc << 8) & 0xFFFF) ^ np.int64(_CRC16[(crc >> 8) ^ byte])


@njit(cache=True, nogil=True)
def page_slots(tables, pages, prefixes, ends, slots):  # type: ignore[no-untyped-def]
    """slots[c] of the key `prefix of tables[c]` + `pages[c]` in decimal; int64 [k] all three. Keys have no hash tag."""
    known, of_prefix = -1, 0
    for command in range(len(slots)):
        if tables[command] != known:
            known, of_prefix = tables[command], 0
            for place in range(ends[known], ends[known + 1]):
                of_prefix = _crc16(of_prefix, np.int64(prefixes[place]))
        crc, unit, page = of_prefix, 1, pages[command]
        while page // unit >= 10:
            unit *= 10
        while unit:
            crc = _crc16(crc, 48 + page // unit % 10)
            unit //= 10
        slots[command] = crc & (SLOTS - 1)


@dataclass(frozen=True, slots=True)
class Shard:
    master: Host
    replicas: tuple[Host, ...] = ()


@dataclass(frozen=True, slots=True)
class SlotMap:
    """shard_of: int16 [16384], a slot's place in `shards`; -1: nobody serves it."""

    shards: tuple[Shard, ...]
    shard_of: NDArray[np.int16]

    @property
    def hosts(self) -> frozenset[Host]:
        return frozenset(host for shard in self.shards for host in (shard.master, *shard.replicas))

    def with_moved(self, moved: Mapping[int, Host]) -> SlotMap:
        """As this one, but for the slots that are known to have another master."""
        shards, shard_of = list(self.shards), self.shard_of.copy()
        places = {shard.master: place for place, shard in enumerate(shards)}
        for slot, host in moved.items():
            if host not in places:
                places[host] = len(shards)
                shards.append(Shard(host))
            shard_of[slot] = places[host]
        return SlotMap(tuple(shards), shard_of)


def slot_map(reply: object, asked: Host) -> SlotMap:
    """Out of the reply to CLUSTER SLOTS, [[first slot, last slot, master, replica…]…], each node [host, port, …].

    asked: who told it; a node that does not know its own address gives an empty one. Raises ValueError.
    """
    places: dict[Shard, int] = {}
    shard_of = np.full(SLOTS, -1, np.int16)
    try:
        assert isinstance(reply, list)
        for first, last, *nodes in reply:
            master, *replicas = (_host(node, asked) for node in nodes)
            shard = Shard(master, tuple(replicas))
            shard_of[first : last + 1] = places.setdefault(shard, len(places))
    except (AssertionError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"no reply to CLUSTER SLOTS: {str(reply)[:200]}") from error
    if not places:
        raise ValueError(f"{asked[0]}:{asked[1]} knows of no node that serves a slot: is it in a cluster (still)?")
    return SlotMap(tuple(places), shard_of)


def _host(node: list[object], asked: Host) -> Host:
    name, port = node[0], node[1]
    assert isinstance(port, int)
    return _known(name.decode() if isinstance(name, bytes) else "", asked), port


def _known(name: str, asked: Host) -> str:
    """A node that has no name to give says so by nothing or "?": it is where the one that was asked is."""
    return asked[0] if name in ("", "?") else name


def redirection(line: str, asked: Host) -> tuple[int, Host] | None:
    """Slot and node of the error replies `MOVED SLOT HOST:PORT` and `ASK SLOT HOST:PORT`; None for another one."""
    found = _REDIRECTION.fullmatch(line)
    if found is None or int(found["slot"]) >= SLOTS:
        return None
    name = found["host"].strip("[]")
    return int(found["slot"]), (_known(name, asked), int(found["port"]))
