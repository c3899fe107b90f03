"""How much memory a bundle's tables want in Redis, node by node, and what caches of them answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from embedding_store.bundle import read_release_manifest
from embedding_store.cache_forecast import POLICIES, STEP_BYTES, CacheForecast, CachePlan, read_forecast
from embedding_store.codec import bucket_rows, page_rows, row_bytes
from embedding_store.redis_memory import table_bytes
from embedding_store.release import Codec, ReleaseManifest, TableInfo

HIT_RATES = (0.90, 0.95, 0.99)

# Beside the pages of a node: connections, scripts, and nodes that got more than their part of the pages.
_HEADROOM = 1.05
_SERVER_BYTES = 64 << 20
# What Redis does not count as used: freed memory between pages, and while a replica is filled, what waits for it
# (client-output-buffer-limit replica 256mb).
_FRAGMENTATION = 1.10
_REPLICA_BUFFER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class TablePlan:
    name: str
    rows: int
    dim: int
    codec: Codec
    ids: str  # dense, sparse
    row_bytes: int
    bytes: int  # in the bundle, and in a memory-mapped store
    redis_bytes: int  # of one release, in one copy


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One of `nodes` equal Redis masters; each of their replicas takes the same."""

    nodes: int
    replicas: int  # of each master
    releases: int  # beside each other
    data_bytes: int  # pages and keys, as `used_memory` counts them
    maxmemory: int  # the setting
    host_bytes: int  # memory to give the node
    total_bytes: int  # of all nodes, masters and replicas


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """The smallest caches, in steps of STEP_BYTES, with this raw hit rate."""

    hit_rate: float  # 0 … 1
    bytes: Mapping[str, int]  # by policy


@dataclass(frozen=True, slots=True)
class Plan:
    release: str
    tables: tuple[TablePlan, ...]
    redis: NodePlan
    caches: tuple[CachePlan, ...]  # both empty where the bundle does not say how often ids are asked for
    cache_sizes: tuple[CacheSizes, ...]


def plan_bundle(
    bundle: Path,
    *,
    cache_sizes: Sequence[int] = (),
    nodes: int = 1,
    replicas: int = 0,
    releases: int = 2,
    codec: Codec | None = None,
) -> Plan:
    """cache_sizes: bytes; without any, up to where all rows fit. codec: as if the bundle had been exported with it.

    Raises InvalidRelease.
    """
    manifest = read_release_manifest(bundle)
    if codec is not None:
        manifest = _with_codec(manifest, codec)
    tables = tuple(_table(table, cluster=nodes > 1) for table in manifest.tables)
    redis = _nodes(sum(table.redis_bytes for table in tables), nodes, replicas, releases)
    forecast = read_forecast(bundle, manifest)
    if forecast is None:
        return Plan(manifest.name, tables, redis, (), ())
    caches = tuple(forecast.at(size) for size in cache_sizes or _sizes(forecast))
    return Plan(manifest.name, tables, redis, caches, tuple(_sizes_for(forecast, rate) for rate in HIT_RATES))


def _table(table: TableInfo, *, cluster: bool) -> TablePlan:
    return TablePlan(
        name=table.name,
        rows=table.rows,
        dim=table.dim,
        codec=table.codec,
        ids=table.ids,
        row_bytes=table.row_bytes,
        bytes=table.bytes + table.ids_bytes,
        redis_bytes=table_bytes(table, cluster=cluster),
    )


def _nodes(release_bytes: int, nodes: int, replicas: int, releases: int) -> NodePlan:
    data = -(-releases * release_bytes // nodes)
    maxmemory = round(_HEADROOM * data) + _SERVER_BYTES
    host = round(_FRAGMENTATION * maxmemory) + replicas * _REPLICA_BUFFER_BYTES
    return NodePlan(nodes, replicas, releases, data, maxmemory, host, nodes * (1 + replicas) * host)


def _sizes(forecast: CacheForecast) -> list[int]:
    """Up to five, each four times the one before; the last one has room for every row that is asked for."""
    sizes = [STEP_BYTES]
    while forecast.at(sizes[-1]).rates["lru"].raw < 1:
        sizes.append(4 * sizes[-1])
    return sizes[-5:]


def _sizes_for(forecast: CacheForecast, rate: float) -> CacheSizes:
    return CacheSizes(rate, {policy: forecast.bytes_for(rate, policy) for policy in POLICIES})


def _with_codec(manifest: ReleaseManifest, codec: Codec) -> ReleaseManifest:
    tables = []
    for table in manifest.tables:
        width = row_bytes(codec, table.dim)
        rows = bucket_rows(width) if table.sparse else page_rows(width)
        tables.append(
            msgspec.structs.replace(table, codec=codec, row_bytes=width, page_rows=rows, default_row=b"")
        )  # fmt: skip
    return msgspec.structs.replace(manifest, tables=tuple(tables))
