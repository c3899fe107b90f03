"""One command to the node of a Redis Cluster that has its key; when and how often a node is asked again."""

from __future__ import annotations

import random
import time

from redis.crc import key_slot

from embedding_store.errors import StoreUnavailable
from embedding_store.redis_slots import redirection
from embedding_store.redis_topology import Topology
from embedding_store.redis_url import Host
from embedding_store.talks import Talk, pause

MOST_TRIES = 8  # for one command, redirections and all
LATER = ("TRYAGAIN", "CLUSTERDOWN")  # error replies that pass
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.2  # seconds before another try


def try_pause(tries: int, limit: float) -> Talk[None]:
    """Before a command is tried once more. Raises TimeoutError."""
    longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**tries)
    yield from pause(longest * random.uniform(0.5, 1), limit)


def ask_master(topology: Topology, command: tuple[str, ...], limit: float) -> Talk[object]:
    """command[1] is its key. Redirections are followed, and what passes is waited for, as far as `limit` allows; the
    last error reply is returned. Raises StoreUnavailable."""
    if topology.due:
        yield from _refresh(topology, limit)
    slot = key_slot(command[1].encode())
    redirected: tuple[Host, bool] | None = None
    for tries in range(MOST_TRIES + 1):
        seen, last = time.monotonic(), tries == MOST_TRIES
        host, asking = redirected or ((yield from _master(topology, slot, limit)), False)
        redirected = None
        if host is None:
            topology.suspect()
            if last or not (yield from _later(topology, tries, limit, seen)):
                raise StoreUnavailable(f"no node serves slot {slot}")
            continue
        node = topology.node(host)
        try:
            reply = yield from node.request(command, limit, asking=asking)
        except StoreUnavailable:
            topology.suspect()
            if last or node.breaker.open or not (yield from _later(topology, tries, limit, seen)):
                raise
            continue
        line = str(reply) if isinstance(reply, Exception) else ""
        elsewhere = redirection(line, host)
        if elsewhere is not None:
            redirected = elsewhere[1], line.startswith("ASK")
            if line.startswith("MOVED"):
                topology.moved({elsewhere[0]: elsewhere[1]})
        elif last or not line.startswith(LATER) or not (yield from _later(topology, tries, limit, seen)):
            return reply
    return reply


def _refresh(topology: Topology, limit: float) -> Talk[None]:
    """In half of the time at most. Where it fails the command goes by what is known."""
    now = time.monotonic()
    try:
        yield from topology.refresh(now + (limit - now) / 2, now)
    except StoreUnavailable:
        topology.suspect()


def _master(topology: Topology, slot: int, limit: float) -> Talk[Host | None]:
    known = yield from topology.slot_map(limit)
    place = int(known.shard_of[slot])
    return known.shards[place].master if place >= 0 else None


def _later(topology: Topology, tries: int, limit: float, seen: float) -> Talk[bool]:
    """Whether there is time for another try, which goes by the slots as they are then."""
    try:
        yield from try_pause(tries, limit)
        yield from topology.refresh(limit, seen)
    except (TimeoutError, StoreUnavailable):
        return False
    return True
