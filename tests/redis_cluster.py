"""A real Redis Cluster for tests: six redis-servers, three masters with a replica each, on free ports."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from tests.redis_server import RedisServer, free_port

SLOTS = 16384
_OPTIONS = (
    "--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no",
    "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1",
)  # fmt: skip


class RedisCluster:
    """nodes: masters first, then their replicas in the same order. Master i has the i-th third of the slots."""

    def __init__(self, *options: str, masters: int = 3, tls: tuple[Path, Path, Path] | None = None) -> None:
        """`options` and `tls` go to every server, as for RedisServer. With tls the nodes use it among them too."""
        self.masters = masters
        self._tls = tls is not None
        if tls is not None:
            options = ("--tls-cluster", "yes", "--tls-replication", "yes", *options)
        self.nodes: list[RedisServer] = []
        bus_ports = [free_port() for _ in range(2 * masters)]
        try:
            for port in bus_ports:
                self.nodes.append(RedisServer("--cluster-port", str(port), *_OPTIONS, *options, tls=tls))
            self._join(bus_ports)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Of all nodes, so that it also serves when some are down."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports())
        return f"{'rediss' if self._tls else 'redis'}+cluster://{hosts}"

    def client(self, number: int) -> redis.Redis:
        """Of one node, past everything of ours."""
        return redis.Redis(port=self.nodes[number].port, protocol=2, decode_responses=True)

    def node_id(self, number: int) -> str:
        return str(self.client(number).execute_command("CLUSTER MYID"))

    def slots_of(self, number: int) -> range:
        """Those that master `number` was given at the start."""
        return range(number * SLOTS // self.masters, (number + 1) * SLOTS // self.masters)

    def is_master(self, number: int) -> bool:
        return self.client(number).execute_command("ROLE")[0] == "master"

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} within {seconds:g} s")
            time.sleep(0.05)

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def _join(self, bus_ports: list[int]) -> None:
        for number in range(self.masters):
            slots = self.slots_of(number)
            self.client(number).execute_command("CLUSTER ADDSLOTSRANGE", slots[0], slots[-1])
            self.client(number).execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for port, bus_port in zip(self._ports(), bus_ports, strict=True):
            self.client(0).execute_command("CLUSTER MEET", "127.0.0.1", port, bus_port)
        everybody = range(len(self.nodes))
        self.wait(lambda: all(self._has_met_all(number) for number in everybody), "meeting of all nodes")
        for number in range(self.masters):
            self.client(self.masters + number).execute_command("CLUSTER REPLICATE", self.node_id(number))
        self.wait(lambda: all(self._is_whole(number) for number in everybody), "whole cluster")

    def _ports(self) -> list[int]:
        """By which the nodes know each other."""
        return [node.tls_port if self._tls else node.port for node in self.nodes]

    def _has_met_all(self, number: int) -> bool:
        nodes = self._nodes_known_to(number)
        return len(nodes) == len(self.nodes) and all("handshake" not in node["flags"] for node in nodes)

    def _is_whole(self, number: int) -> bool:
        """This node is ready, and knows of every slot a master and a replica that has received something."""
        parts = self.client(number).execute_command("CLUSTER SLOTS")
        state = self.client(number).execute_command("CLUSTER INFO")["cluster_state"]
        return state == "ok" and len(parts) == self.masters and all(len(part) == 4 for part in parts)

    def _nodes_known_to(self, number: int) -> list[dict[str, Any]]:
        return list(self.client(number).execute_command("CLUSTER NODES").values())
