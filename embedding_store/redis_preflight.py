"""Whether a Redis will take a release: asked before the first page is written, so that the answer says what to set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec
import redis

from embedding_store.backend import Verified, namespace
from embedding_store.byte_sizes import format_size
from embedding_store.errors import StoreNotReady
from embedding_store.redis_keys import decode_record, page_key
from embedding_store.redis_memory import table_bytes
from embedding_store.release import ReleaseManifest

if TYPE_CHECKING:
    from embedding_store.redis_backend import RedisBackend

_SLOTS = 16384
_SLACK = 1.05  # in what the message asks for: what is in use changes while it is read
_WHILE_WRITING = 2 << 20  # bytes: replies that the publisher has not read yet, and the server's own buffers
_COMMANDS = "get set strlen exists unlink del pttl hget hset hdel hexists hgetall hkeys hvals eval time info ping"


@dataclass(frozen=True, slots=True)
class _Node:
    """A server that takes writes."""

    where: str  # for messages
    info: dict[str, Any]  # of INFO
    share: float  # of the keys
    probe: str  # a key of ours that lies there


def check_server(backend: RedisBackend, manifest: ReleaseManifest, room: int | None) -> None:
    """See `Backend.preflight`."""
    with backend.errors():
        try:
            nodes = _cluster(backend, manifest) if backend.cluster else [_server(backend, manifest)]
            for node in nodes:
                _check_settings(node)
            missing = _missing_bytes(backend, manifest) if room is None else room
            for node in nodes:
                _check_memory(node, manifest, missing)
                _check_writing(backend, node)
        except redis.exceptions.NoPermissionError as error:
            raise StoreNotReady(
                f"{backend.address} does not let this user publish ({error}); it needs: "
                f"ACL SETUSER NAME {publisher_rights(backend.prefix, cluster=backend.cluster)}"
            ) from error


def publisher_rights(prefix: str, *, cluster: bool = False) -> str:
    """What a user needs who publishes, activates and removes: the rules of ACL SETUSER."""
    commands = _COMMANDS.split() + (["cluster|slots", "cluster|info", "command"] if cluster else ["select"])
    return " ".join([f"~{prefix}:*", f"~{{{prefix}}}:*", *(f"+{command}" for command in commands)])


def _server(backend: RedisBackend, manifest: ReleaseManifest) -> _Node:
    info = backend.control.info()
    if info.get("cluster_enabled"):
        raise StoreNotReady(f"{backend.address} is a node of a cluster, not the store: use redis+cluster://")
    return _Node(backend.address, info, 1.0, _probe(backend, manifest, 0))


def _cluster(backend: RedisBackend, manifest: ReleaseManifest) -> list[_Node]:
    control: Any = backend.control
    state = control.cluster_info()
    covered = int(state.get("cluster_slots_ok", 0))
    if state.get("cluster_state") != "ok" or covered != _SLOTS:
        raise StoreNotReady(
            f"{backend.address}: cluster_state is {state.get('cluster_state')}, and {covered} of {_SLOTS} slots are "
            "served; every slot needs a master that is up: redis-cli --cluster check HOST:PORT"
        )
    probes: dict[str, str] = {}
    number = 0
    slots = Counter(nodes[0].name for nodes in control.nodes_manager.slots_cache.values())
    while len(probes) < len(slots):
        probe = _probe(backend, manifest, number)
        probes.setdefault(control.get_node_from_key(probe).name, probe)
        number += 1
    return [
        _Node(
            f"{backend.address}, node {master.name}",
            control.info(target_nodes=master),
            slots[master.name] / _SLOTS,
            probes[master.name],
        )
        for master in control.get_primaries()
        if master.name in probes
    ]


def _probe(backend: RedisBackend, manifest: ReleaseManifest, number: int) -> str:
    """A key like those of pages, of a table that cannot be: names are not empty."""
    return page_key(backend.prefix, namespace(manifest), "", f"probe{number}")


def _check_settings(node: _Node) -> None:
    if node.info.get("role") == "slave":
        master = f"{node.info.get('master_host')}:{node.info.get('master_port')}"
        raise StoreNotReady(f"{node.where} is a read-only replica of {master}: publish there")
    policy = node.info.get("maxmemory_policy")
    if policy != "noeviction":
        raise StoreNotReady(
            f"{node.where}: maxmemory-policy is {policy}, so pages may be evicted; set it to noeviction: "
            "CONFIG SET maxmemory-policy noeviction, and the same in redis.conf or the provider's settings"
        )


def _missing_bytes(backend: RedisBackend, manifest: ReleaseManifest) -> float:
    """Memory that the release takes, without what an interrupted publication has written."""
    content = namespace(manifest)
    record = cast(bytes | None, backend.control.hget(backend.key("writing"), content))
    place = content if record is None else decode_record(backend.address, manifest.name, record).namespace
    found = cast(dict[bytes, bytes], backend.control.hgetall(backend.key(place, "verified")))
    verified = {name.decode(): msgspec.json.decode(value, type=Verified).pages for name, value in found.items()}
    return sum(
        table_bytes(table, prefix=backend.prefix, cluster=backend.cluster)
        * (1 - verified.get(table.name, 0) / table.pages)
        for table in manifest.tables
    )


def _check_memory(node: _Node, manifest: ReleaseManifest, missing: float) -> None:
    limit = int(node.info.get("maxmemory", 0))
    name = "maxmemory" if limit else "the machine's memory"
    limit = limit or int(node.info.get("total_system_memory", 0))
    used = int(node.info["used_memory"]) - int(node.info.get("mem_not_counted_for_evict", 0))
    needed = round(missing * node.share) + _WHILE_WRITING
    if limit and used + needed > limit:
        asked = format_size(round(_SLACK * (used + needed)))
        raise StoreNotReady(
            f"{node.where} has no memory left for writing {manifest.name}: it takes {format_size(needed)}, and "
            f"{format_size(used)} of {name}, {format_size(limit)}, are in use; raise {name} to {asked} at least, or "
            "remove old releases: torchrank gc"
        )


def _check_writing(backend: RedisBackend, node: _Node) -> None:
    try:
        backend.control.set(node.probe, b"")
        backend.control.unlink(node.probe)
    except redis.exceptions.NoPermissionError:
        raise
    except redis.ResponseError as error:
        raise StoreNotReady(f"{node.where} does not take writes: {error}") from error
