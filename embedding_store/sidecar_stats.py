"""What a sidecar counts, and the text of INFO.

All of it is written by the event loop alone, so that nothing here needs a lock.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from embedding_store.served import ServedStats

_STEPS = 8  # buckets per doubling: a percentile is at most 9 % above the true one
_BUCKETS = 27 * _STEPS  # 1 µs to 134 s


class LatencyHistogram:
    """Fixed logarithmic buckets: bucket i counts what took at most 2^(i / 8) µs, and more than the one before it."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.total = 0

    def record(self, seconds: float) -> None:
        bucket = math.ceil(math.log2(max(seconds * 1e6, 1.0)) * _STEPS)
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self.total += 1

    def percentile(self, share: float) -> float:
        """Upper edge, in µs, of the bucket in which the `share` (0 … 1) of the calls is reached; 0 before the first."""
        if not self.total:
            return 0.0
        wanted = max(1, math.ceil(share * self.total))
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return float(2 ** (bucket / _STEPS))
        raise AssertionError("counts do not add up to their total")


@dataclass(slots=True)
class SidecarStats:
    started: float = field(default_factory=time.time)
    connections: int = 0  # open now
    connections_total: int = 0
    commands: int = 0
    errors: int = 0  # error replies, to look-ups or anything else
    lookups: int = 0  # answered
    ids: int = 0  # as asked, duplicates within one request included
    absent: int = 0
    unavailable: int = 0
    offloaded: int = 0  # look-ups that went to a thread because a row had to come over a network
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process, and the part of it that is not a mapped file, as /proc has them."""
    with open("/proc/self/statm", "rb") as statm:
        _, resident, shared, *_ = map(int, statm.read().split())
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - shared) * page


def info_sections(
    stats: SidecarStats, store: ServedStats, server: Mapping[str, object], releases: Mapping[str, str]
) -> dict[str, dict[str, object]]:
    """Section -> key -> value, as INFO shows them. server: version, addresses and the like; releases: name -> state."""
    resident, anonymous = resident_bytes()
    asked = store.hits + store.misses
    return {
        "Server": {
            **server,
            "store": store.address,
            "process_id": os.getpid(),
            "uptime_in_seconds": int(time.time() - stats.started),
        },
        "Clients": {
            "connected_clients": stats.connections,
            "total_connections_received": stats.connections_total,
            "total_commands_processed": stats.commands,
            "total_error_replies": stats.errors,
        },
        "Memory": {
            "used_memory_rss": resident,
            "used_memory_rss_anonymous": anonymous,
            "cache_bytes": store.cache_bytes,
            "cache_capacity_bytes": store.cache_capacity_bytes,
        },
        "Lookups": {
            "lookups": stats.lookups,
            "lookups_offloaded": stats.offloaded,
            "ids": stats.ids,
            "absent": stats.absent,
            "unavailable": stats.unavailable,
            "cache_hits": store.hits,
            "cache_misses": store.misses,
            "cache_hit_rate": f"{store.hits / asked if asked else 0:.4f}",
            "server_p50_us": f"{stats.latency.percentile(0.50):.0f}",
            "server_p99_us": f"{stats.latency.percentile(0.99):.0f}",
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
