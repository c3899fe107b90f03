"""What `GET /metrics` shows, in a registry of its own: nothing of other libraries in this process leaks in."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from torchrank.serving.messages import RankResponse

STAGES = ("decode", "features", "lookup", "graph", "encode")

# Seconds. Ranking a few hundred candidates takes a few milliseconds; a look-up that misses, tens.
_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ServiceMetrics:
    """Thread-safe: the ranking threads write into it, the event loop reads."""

    def __init__(self, release: str) -> None:
        self.registry = CollectorRegistry()
        loaded = Gauge("torchrank_release", "Release that is served; always 1", ["release"], registry=self.registry)
        loaded.labels(release).set(1)
        self._requests = Counter(
            "torchrank_requests", "Answered POST /rank, by HTTP status", ["status"], registry=self.registry
        )
        self._seconds = Histogram(
            "torchrank_request_seconds", "POST /rank, start to end", registry=self.registry, buckets=_BUCKETS
        )
        stage_seconds = Histogram(
            "torchrank_stage_seconds", "Parts of POST /rank", ["stage"], registry=self.registry, buckets=_BUCKETS
        )
        self._stages = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self._candidates = Counter("torchrank_candidates", "Candidates that were scored", registry=self.registry)
        self._absent = Counter(
            "torchrank_absent_ids", "Ids without a row, scored with the default row", registry=self.registry
        )
        degraded = Counter(
            "torchrank_degraded_ids", "Ids whose row could not be fetched, by what stood in", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self._degraded = {status: degraded.labels(status) for status in ("unavailable", "stale")}
        self.in_flight = Gauge("torchrank_requests_in_flight", "POST /rank being answered", registry=self.registry)

    def observe_stage(self, stage: str, seconds: float) -> None:
        self._stages[stage].observe(seconds)

    def observe_request(self, status: int, seconds: float) -> None:
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def observe_scores(self, candidates: int, response: RankResponse) -> None:
        self._candidates.inc(candidates)
        self._absent.inc(response.absent)
        self._degraded["unavailable"].inc(response.unavailable)
        self._degraded["stale"].inc(response.stale)

    def exposition(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)
