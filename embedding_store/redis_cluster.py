"""Rows out of a Redis Cluster: each page of the node that has its slot, all nodes at the same time, in one thread."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import NodeStats
from embedding_store.errors import StoreUnavailable
from embedding_store.redis_cluster_request import LATER, MOST_TRIES, ask_master, try_pause
from embedding_store.redis_connection import Refusals
from embedding_store.redis_fetch import PageFetch
from embedding_store.redis_node import RedisNode
from embedding_store.redis_read import PageReader
from embedding_store.redis_rights import refusal
from embedding_store.redis_slots import Shard, page_slots, redirection
from embedding_store.redis_topology import Topology
from embedding_store.redis_url import Host, RedisAddress
from embedding_store.redis_wire import LOST
from embedding_store.talks import Talk, Talks

Commands = NDArray[np.int64]


class ClusterReader(PageReader):
    def __init__(self, address: RedisAddress) -> None:
        super().__init__(address)
        self._topology = Topology(address)
        nothing = np.empty(0, np.int64)
        page_slots(nothing, nothing, np.frombuffer(b"", np.uint8), nothing, nothing)  # see `compile_kernels`

    def nodes(self) -> Sequence[NodeStats]:
        return self._topology.stats()

    def close(self) -> None:
        self._topology.close()

    def _begin(self, talks: Talks, fetch: PageFetch, limit: float) -> None:
        ClusterFetch(self._topology, talks, fetch, limit, self.address.replicas).begin()

    def _request(self, command: tuple[str, ...], limit: float) -> Talk[object]:
        return ask_master(self._topology, command, limit)


class ClusterFetch:
    """One fetch. Its commands are divided among nodes, and those that a node does not answer are tried again: where it
    says that they moved, or where the slot map says after it was read anew. Rows of the other nodes do not wait."""

    def __init__(self, topology: Topology, talks: Talks, fetch: PageFetch, limit: float, replicas: bool) -> None:
        self._topology = topology
        self._talks = talks
        self._fetch = fetch
        self._limit = limit
        self._replicas = replicas
        self._slots = np.empty(fetch.size, np.int64)
        page_slots(fetch.tables, fetch.pages, fetch.keys.prefixes, fetch.keys.ends, self._slots)

    def begin(self) -> None:
        if self._topology.due:
            self._talks.start(self._refresh_aside())
        self._talks.start(self._route(self._fetch.all(), 0, replicas=self._replicas))

    def _refresh_aside(self) -> Talk[None]:
        """For the fetches to come; this one goes by what is known, and does not fail with it."""
        try:
            yield from self._topology.refresh(self._limit, time.monotonic())
        except StoreUnavailable:
            self._topology.suspect()

    def _route(self, commands: Commands, tries: int, *, replicas: bool = False) -> Talk[None]:
        """Begins to ask each of the nodes that have these commands' slots."""
        try:
            slot_map = yield from self._topology.slot_map(self._limit)
        except StoreUnavailable as unavailable:
            self._fetch.fail(unavailable)
            return
        shards = slot_map.shard_of[self._slots[commands]]
        for place in np.unique(shards).tolist():
            part = commands[shards == place]
            if place < 0:
                nobody = StoreUnavailable(f"no node serves slot {self._slots[part[0]]}, among others")
                self._talks.start(self._retry(part, tries, nobody))
                continue
            shard = slot_map.shards[place]
            host = self._choose(shard) if replicas else shard.master
            self._talks.start(self._ask(part, host, tries, of_replica=host != shard.master))

    def _choose(self, shard: Shard) -> Host:
        """A replica, by chance; the master where none is to be had."""
        usable = [host for host in shard.replicas if self._topology.node(host).breaker.lets]
        return random.choice(usable) if usable else shard.master

    def _ask(
        self, commands: Commands, host: Host, tries: int, *, of_replica: bool = False, asking: bool = False
    ) -> Talk[None]:
        node = self._topology.node(host)
        if tries:
            self._fetch.ask_again(commands)
        limit = self._limit
        if of_replica:  # half of the time, so that there is some for its master where it keeps silent
            limit -= (limit - time.monotonic()) / 2
        try:
            refusals = yield from node.ask(self._fetch, commands, limit, asking=asking)
        except StoreUnavailable as unavailable:
            if of_replica:
                yield from self._route(self._fetch.without_row(commands), tries + 1)
            else:
                left = self._fetch.unanswered(commands)
                yield from self._retry(left, tries, unavailable, hopeless=node.breaker.open)
            return
        if of_replica:
            lost = self._fetch.having(commands, LOST)  # a replica may lag: its master knows
            if len(lost):
                self._talks.start(self._route(lost, tries + 1))
        if refusals:
            self._follow(node, host, refusals, tries)

    def _follow(self, node: RedisNode, host: Host, refusals: Refusals, tries: int) -> None:
        """Does what a node's error replies say."""
        moved: dict[int, Host] = {}
        elsewhere: dict[tuple[Host, bool], list[int]] = {}
        for line, commands in refusals.items():
            why = refusal(node.address, line)
            kind = line.partition(" ")[0]
            redirected = redirection(line, host) if tries < MOST_TRIES else None
            if redirected is not None:
                slot, to = redirected
                elsewhere.setdefault((to, kind == "ASK"), []).extend(commands)
                if kind == "MOVED":
                    moved[slot] = to
            elif kind in LATER:
                self._talks.start(self._retry(np.array(commands), tries, why))
            else:
                self._fetch.fail(why)
        if moved:
            self._topology.moved(moved)
        for (to, asking), commands in elsewhere.items():
            self._talks.start(self._ask(np.array(commands), to, tries + 1, asking=asking))

    def _retry(self, commands: Commands, tries: int, why: StoreUnavailable, *, hopeless: bool = False) -> Talk[None]:
        """Once more, after a pause and by the slot map as it is then; at the end of time or tries, `why`."""
        self._topology.suspect()
        if hopeless or tries >= MOST_TRIES:
            self._fetch.fail(why)
            return
        seen = time.monotonic()
        try:
            yield from try_pause(tries, self._limit)
            yield from self._topology.refresh(self._limit, seen)
        except (TimeoutError, StoreUnavailable):
            self._fetch.fail(why)
            return
        yield from self._route(commands, tries + 1)
