"""The text of INFO: for people, and under Redis's own names where exporters of Redis look for them."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping

from embedding_store.served import ServedStats
from embedding_store.sidecar_stats import SidecarStats

Sections = dict[str, dict[str, object]]  # section -> key -> value


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process, and the part of it that is not a mapped file, as /proc has them."""
    with open("/proc/self/statm", "rb") as statm:
        _, resident, shared, *_ = map(int, statm.read().split())
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - shared) * page


def info_sections(
    stats: SidecarStats,
    store: ServedStats,
    server: Mapping[str, object],
    releases: Mapping[str, str],
    obstacle: str,
    unknown_tables: Collection[str],
) -> Sections:
    """server: version, addresses and the like; releases: name -> state; obstacle: why it is not ready, or empty;
    unknown_tables: see `ServedReleases`."""
    resident, anonymous = resident_bytes()
    asked = store.hits + store.misses
    return {
        "Server": {
            **server,
            "store": store.address,
            "process_id": os.getpid(),
            "uptime_in_seconds": int(time.time() - stats.started),
            "ready": int(not obstacle),
            **({"not_ready": obstacle} if obstacle else {}),
            **({"on_unavailable_unknown_tables": ",".join(sorted(unknown_tables))} if unknown_tables else {}),
        },
        "Clients": {
            "connected_clients": stats.connections,
            "maxclients": stats.connections_limit,
            "idle_closed_clients": stats.connections_idle_closed,
        },
        "Memory": {
            "used_memory_rss": resident,
            "used_memory_rss_anonymous": anonymous,
            "cache_bytes": store.cache_bytes,
            "cache_capacity_bytes": store.cache_capacity_bytes,
        },
        "Stats": {
            "total_connections_received": stats.connections_total,
            "rejected_connections": stats.connections_rejected,
            "total_commands_processed": stats.commands,
            "total_error_replies": stats.errors.total(),
        },
        "Lookups": {
            "lookups": stats.lookups,
            "lookups_offloaded": stats.offloaded,
            "lookups_waiting": stats.waiting,
            "lookups_late": stats.late,
            "lookups_shed": store.shed,
            "ids": stats.ids,
            "absent": stats.absent,
            "unavailable": stats.unavailable,
            "stale": stats.stale,
            "degraded_share": f"{stats.degraded.share:.4f}",
            "cache_hits": store.hits,
            "cache_misses": store.misses,
            "cache_evictions": store.evictions,
            "misses_waiting": store.ids_waiting,
            "misses_joined": store.ids_joined,
            "cache_hit_rate": f"{store.hits / asked if asked else 0:.4f}",
            "server_p50_us": f"{stats.latency.percentile(0.50):.0f}",
            "server_p99_us": f"{stats.latency.percentile(0.99):.0f}",
        },
        "Errorstats": {f"errorstat_{code}": f"count={count}" for code, count in sorted(stats.errors.items())},
        "Nodes": {
            f"node{number}_{key}": value
            for number, node in enumerate(store.nodes)
            for key, value in (
                ("address", node.address),
                ("open", int(node.open)),
                ("fetches", node.fetches),
                ("failures", node.failures),
                ("mean_us", f"{node.seconds / max(1, node.fetches) * 1e6:.0f}"),
            )
        },
        "Releases": dict(releases),
    }


def info_text(sections: Mapping[str, Mapping[str, object]], wanted: str | None = None) -> str:
    """Redis's form: `# Section`, then `key:value` lines; `wanted` is one section's name, in any case."""
    return "\r\n".join(
        f"# {name}\r\n" + "".join(f"{key}:{value}\r\n" for key, value in values.items())
        for name, values in sections.items()
        if wanted in (None, name.lower(), "all", "everything", "default")
    )
