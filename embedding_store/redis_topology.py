"""What is known of a Redis Cluster: its nodes and who serves which slot, read anew when that seems to have changed."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Mapping, Sequence

from embedding_store.backend import NodeStats
from embedding_store.errors import StoreUnavailable
from embedding_store.redis_connection import tls_context
from embedding_store.redis_node import RedisNode
from embedding_store.redis_slots import SlotMap, slot_map
from embedding_store.redis_url import Host, RedisAddress
from embedding_store.talks import Talk, pause

_REFRESH_WITHIN = 0.1  # seconds, by chance: the processes which saw a change at one moment do not all ask at one moment
_ONE_NODE = 0.5  # seconds that one node has for telling the slots, before another is asked
_SHARED_PAUSE = 0.002  # seconds between looks whether another thread has read the topology


class Topology:
    """Thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._tls = tls_context(address)
        self._nodes: dict[Host, RedisNode] = {}
        self._map: SlotMap | None = None
        self._read_at = -math.inf
        self._due = math.inf  # when it should be read anew
        self._refreshing = False
        self._lock = threading.Lock()

    def node(self, host: Host) -> RedisNode:
        with self._lock:
            node = self._nodes.get(host)
            if node is None:
                node = self._nodes[host] = RedisNode(self._address.node(host), self._tls)
            return node

    def stats(self) -> Sequence[NodeStats]:
        with self._lock:
            nodes = sorted(self._nodes.items())
        return tuple(node.stats() for _, node in nodes)

    def close(self) -> None:
        with self._lock:
            nodes, self._nodes = list(self._nodes.values()), {}
        for node in nodes:
            node.close()

    def slot_map(self, limit: float) -> Talk[SlotMap]:
        """As last read; read now where it never was. Raises StoreUnavailable."""
        if self._map is None:
            yield from self.refresh(limit, -math.inf)
        assert self._map is not None
        return self._map

    @property
    def due(self) -> bool:
        """Whether it should be read anew, and nobody does at the moment."""
        return time.monotonic() >= self._due and not self._refreshing

    def suspect(self) -> None:
        """Something does not fit what is known: soon to be read anew."""
        with self._lock:
            self._due = min(self._due, time.monotonic() + random.uniform(0, _REFRESH_WITHIN))

    def moved(self, slots: Mapping[int, Host]) -> None:
        """Nodes have said where these slots are now; there may be more, which is for `refresh` to find out."""
        with self._lock:
            if self._map is not None:
                self._map = self._map.with_moved(slots)
        self.suspect()

    def refresh(self, limit: float, since: float) -> Talk[None]:
        """Reads the slot map from a node chosen by chance, from another one where that fails, unless it was read after
        `since`, a reading of time.monotonic(): for all who saw a change one reads it. Raises StoreUnavailable."""
        while not self._begin_refresh():
            try:
                yield from pause(_SHARED_PAUSE, limit)
            except TimeoutError as error:
                raise StoreUnavailable(f"{self._address}: no node told in time who serves which slot") from error
        try:
            if self._read_at <= since:
                self._adopt((yield from self._read(limit)))
        finally:
            self._refreshing = False

    def _begin_refresh(self) -> bool:
        with self._lock:
            mine = not self._refreshing
            self._refreshing = True
            return mine

    def _read(self, limit: float) -> Talk[SlotMap]:
        reasons = []
        for host in self._candidates():
            node = self.node(host)
            now = time.monotonic()
            try:
                # Half of the time that is left at most, so that there is some for another where this one keeps silent.
                reply = yield from node.request(("CLUSTER", "SLOTS"), now + min(_ONE_NODE, (limit - now) / 2))
                if isinstance(reply, Exception):
                    raise ValueError(f"{node} answered: {reply}")
                return slot_map(reply, host)
            except (StoreUnavailable, ValueError) as error:
                reasons.append(str(error))
        raise StoreUnavailable(f"{self._address}: no node tells who serves which slot: {'; '.join(reasons)}")

    def _candidates(self) -> list[Host]:
        """All known nodes by chance, those last that do not answer at the moment."""
        hosts = list((self._map.hosts if self._map else frozenset()) | set(self._address.cluster))
        random.shuffle(hosts)
        return sorted(hosts, key=lambda host: self.node(host).breaker.open)

    def _adopt(self, known: SlotMap) -> None:
        with self._lock:
            self._map, self._read_at, self._due = known, time.monotonic(), math.inf
            gone = self._nodes.keys() - known.hosts - set(self._address.cluster)
            nodes = [self._nodes.pop(host) for host in gone]
        for node in nodes:
            node.close()
