"""The sidecar's counters as Prometheus reads them: made from the counts at the moment of the scrape, so that look-ups
pay nothing for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from embedding_store.backend import FETCH_BUCKETS
from embedding_store.served import ServedLookup, ServedStats
from embedding_store.sidecar_ready import Readiness
from embedding_store.sidecar_releases import ServedReleases
from embedding_store.sidecar_stats import SidecarStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "torchrank_sidecar_"


class SidecarMetrics(Collector):
    """In a registry of its own: nothing of other libraries in this process leaks in."""

    def __init__(self, store: ServedLookup, stats: SidecarStats, releases: ServedReleases, ready: Readiness) -> None:
        self._store = store
        self._stats = stats
        self._releases = releases
        self._ready = ready
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)  # memory, CPU, open files, under their usual names

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        store = self._store.stats()
        yield from self._lookups()
        yield from self._connections()
        yield from _cache(store)
        yield from _fetches(store)
        yield from self._state()

    def _lookups(self) -> Iterator[Metric]:
        stats = self._stats
        degraded = {"absent": stats.absent, "unavailable": stats.unavailable, "stale": stats.stale}
        rows = {"found": stats.ids - sum(degraded.values()), **degraded}
        yield _counter("rows", "Rows answered, by status", rows, "status")
        latency = HistogramMetricFamily(f"{_PREFIX}lookup_seconds", "TR.LOOKUP, decoded to encoded")
        buckets = [(f"{edge:.6g}", float(count)) for edge, count in stats.latency.doublings()]
        latency.add_metric([], [*buckets, ("+Inf", float(stats.latency.total))], stats.latency.seconds)
        yield latency
        yield _counter("lookups_offloaded", "Look-ups that waited for the store in a thread", stats.offloaded)
        yield _gauge("queue_depth", "Look-ups that wait for the store or for a thread", stats.waiting)
        yield _counter("deadline_misses", "Look-ups that took longer than the request allowed", stats.late)

    def _connections(self) -> Iterator[Metric]:
        stats = self._stats
        yield _gauge("connections", "Open connections", stats.connections)
        yield _counter("connections_accepted", "Connections made", stats.connections_total)
        yield _counter("connections_rejected", "Connections beyond the limit", stats.connections_rejected)
        yield _counter("connections_idle_closed", "Connections that said nothing", stats.connections_idle_closed)
        yield _counter("commands", "Commands of any kind", stats.commands)
        yield _counter("errors", "Error replies, by code", dict(stats.errors), "code")

    def _state(self) -> Iterator[Metric]:
        yield _gauge("ready", "1 where TR.READY says so", float(not self._ready.obstacle))
        yield _gauge("degraded_share", "Degraded rows among those of the last seconds", self._stats.degraded.share)
        warm = GaugeMetricFamily(
            f"{_PREFIX}release_warm_rows", "Rows loaded by warming", labels=["release", "model", "active"]
        )
        for release, rows in list(self._releases.warmed.items()):
            model = release.partition("@")[0]
            warm.add_metric([release, model, str(int(self._releases.active.get(model) == release))], rows)
        yield warm


def _cache(store: ServedStats) -> Iterator[Metric]:
    yield _gauge("cache_bytes", "Bytes in use by the hot-id cache", store.cache_bytes)
    yield _gauge("cache_capacity_bytes", "Bytes that the hot-id cache may use", store.cache_capacity_bytes)
    for name, about in (
        ("hits", "Distinct ids of a look-up that the cache had"),
        ("misses", "Distinct ids of a look-up that the cache had not"),
        ("evictions", "Rows that made room for others"),
    ):
        family = CounterMetricFamily(f"{_PREFIX}cache_{name}", about, labels=["release", "table"])
        for release, tables in store.tables.items():
            for table, counted in tables.items():
                family.add_metric([release, table], getattr(counted, name))
        yield family


def _fetches(store: ServedStats) -> Iterator[Metric]:
    yield _gauge("misses_waiting", "Ids that wait for a fetch", store.ids_waiting)
    yield _counter("misses_joined", "Ids that the fetch of another look-up brought", store.ids_joined)
    yield _counter("lookups_shed", "Look-ups turned away because too many ids waited", store.shed)
    nodes = store.nodes
    seconds = HistogramMetricFamily(f"{_PREFIX}fetch_seconds", "Fetches from a server of the store", labels=["node"])
    for node in nodes:
        counts, seen = [], 0
        for edge, count in zip((*map(str, FETCH_BUCKETS), "+Inf"), node.buckets, strict=True):
            seen += count
            counts.append((edge, float(seen)))
        seconds.add_metric([node.address], counts, node.seconds)
    yield seconds
    failures = {node.address: node.failures for node in nodes}
    yield _counter("fetch_failures", "Fetches that failed", failures, "node")
    shunned = {node.address: float(node.open) for node in nodes}
    yield _gauge("node_open", "1 while a server is not asked because it failed", shunned, "node")


def _counter(name: str, about: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    if not isinstance(value, Mapping):
        return CounterMetricFamily(_PREFIX + name, about, value)
    family = CounterMetricFamily(_PREFIX + name, about, labels=[label])
    for key, count in value.items():
        family.add_metric([key], count)
    return family


def _gauge(name: str, about: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    if not isinstance(value, Mapping):
        return GaugeMetricFamily(_PREFIX + name, about, value)
    family = GaugeMetricFamily(_PREFIX + name, about, labels=[label])
    for key, count in value.items():
        family.add_metric([key], count)
    return family
