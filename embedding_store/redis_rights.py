"""What a user of a Redis needs who only looks up: a sidecar, or a store in a process that serves.

Publishing needs more: `redis_preflight.publisher_rights`.
"""

from __future__ import annotations

from embedding_store.errors import StoreUnavailable
from embedding_store.redis_url import RedisAddress

_COMMANDS = "get getrange hget hgetall hkeys exists time ping"
_PINS = "hset hdel"  # by the patterns below on one key only: whoever serves a release says so there
_CLUSTER = "cluster|slots command readonly asking"


def reader_rights(prefix: str, *, cluster: bool = False) -> str:
    """The rules of ACL SETUSER, from Redis 7 on: reading our keys, and writing the pins."""
    commands = f"{_COMMANDS} {_PINS} {_CLUSTER if cluster else 'select'}".split()
    keys = (f"%R~{prefix}:*", f"%R~{{{prefix}}}:*", f"%RW~{{{prefix}}}:pins")
    return " ".join((*keys, *(f"+{command}" for command in commands)))


def refusal(address: RedisAddress, line: str) -> StoreUnavailable:
    """What an error reply of a node means for the rows that it was asked for."""
    answered = f"{address} answered: {line}"
    if line.startswith("NOPERM"):
        rights = reader_rights(address.prefix, cluster=address.in_cluster)
        return StoreUnavailable(f"{answered}; who reads needs: ACL SETUSER NAME {rights}")
    if line.startswith("MOVED") and not address.in_cluster:
        return StoreUnavailable(f"{answered}; it is a node of a cluster: the store URL must be redis+cluster://")
    return StoreUnavailable(answered)
