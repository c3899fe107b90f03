"""/metrics of real sidecars: what Prometheus reads."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_store import resp
from embedding_store.errors import StoreError
from embedding_store.protocol import encode_request
from tests.sidecar.http_pages import metrics
from tests.sidecar.raw_socket import connect, read_all
from tests.sidecar.test_sidecar_client import until


def test_metrics(start, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--metrics", "127.0.0.1:0", "--max-connections", "2")
    client = process.client(connections=1)
    url = client.info()["metrics"]
    before = metrics(url)
    hot = release.hot["item"][:100]
    for _ in range(3):
        client.lookup("feed@v1", {"item": hot, "user": np.array([0, 1, -7])})
    with pytest.raises(StoreError):
        client.lookup("feed@v9", {"item": hot})
    with connect(process.socket), connect(process.socket) as beyond:
        assert read_all(beyond).startswith(b"-ERR max number")
        after = metrics(url)

    def grown(name: str, labels: str = "") -> float:
        return after[name, labels] - before.get((name, labels), 0)

    assert grown("rows_total", "found") == 306
    assert grown("rows_total", "absent") == 3
    assert grown("rows_total", "unavailable") == grown("rows_total", "stale") == 0
    assert grown("lookup_seconds_count") == grown("lookup_seconds_bucket", "+Inf") == 3
    assert 0 < grown("lookup_seconds_sum") < 30
    assert grown("cache_hits_total", "feed@v1,item") == 300  # warmed before it said ready
    assert grown("cache_hits_total", "feed@v1,user") + grown("cache_misses_total", "feed@v1,user") == 9
    assert grown("errors_total", "UNKNOWNRELEASE") == grown("errors_total", "ERR") == 1
    assert grown("connections_rejected_total") == 1
    assert after["connections", ""] == 2
    assert after["ready", ""] == 1
    assert after["queue_depth", ""] == after["deadline_misses_total", ""] == 0
    assert after["release_warm_rows", "1,feed,feed@v1"] == 2968
    assert 0 < after["cache_bytes", ""] <= after["cache_capacity_bytes", ""] == 512 << 20
    assert after["process_resident_memory_bytes", ""] > 1 << 20
    buckets = [value for (name, labels), value in after.items() if name == "lookup_seconds_bucket"]
    assert buckets == sorted(buckets)


def test_metrics_of_a_store_that_is_late(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--metrics", "127.0.0.1:0", url=redis_store.url)
    client = process.client()
    url = client.info()["metrics"]
    cold = np.setdiff1d(np.arange(5000), release.hot["item"])
    client.lookup("feed@v1", {"item": cold[:50]})
    found = metrics(url)
    node = next(labels for name, labels in found if name == "fetch_seconds_count")
    assert node.startswith("redis+unix://")
    assert found["fetch_seconds_count", node] >= 1
    assert found["fetch_seconds_bucket", f"+Inf,{node}"] == found["fetch_seconds_count", node]
    assert found["node_open", node] == found["fetch_failures_total", node] == 0
    redis_store.pause()
    try:
        with connect(process.socket) as raw:
            raw.sendall(resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": cold[100:150]}, 0.5)))
            until(lambda: metrics(url)["queue_depth", ""] == 1, "the look-up waits")
            assert raw.recv(1000).startswith(b"-UNAVAILABLE ")
    finally:
        redis_store.resume()
    found = metrics(url)
    assert found["queue_depth", ""] == 0
    assert found["deadline_misses_total", ""] == 1
    assert found["errors_total", "UNAVAILABLE"] == 1
