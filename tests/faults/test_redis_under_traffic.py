"""A real Redis breaks while look-ups run: nothing wrong is served unflagged, and service resumes by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding_store.backend import namespace
from embedding_store.degrade import DegradePolicy
from embedding_store.lookup import ABSENT, FOUND, STALE, UNAVAILABLE
from embedding_store.open import open_backend, open_store
from embedding_store.publish import publish
from embedding_store.redis_keys import page_key
from embedding_store.store import EmbeddingStore
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.faults.traffic import Traffic
from tests.redis_server import RedisServer

TABLES = (
    TestTable("item", "fp16", rows=4000, dim=16, hot=50, default=True),
    TestTable("user", "int8", rows=3000, dim=24, hot=50, default=True),
)
DEFAULTS = DegradePolicy(("cache", "default"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", 5, tables=TABLES)


@pytest.fixture
def store(redis_server: RedisServer, bundle: Bundle) -> Iterator[EmbeddingStore]:
    """A cache of a tenth of the rows: every look-up has misses."""
    with open_store(redis_server.url, cache_bytes=25_000, degrade=DEFAULTS) as store:
        publish(bundle.folder, store.backend)
        yield store


@pytest.fixture
def traffic(store: EmbeddingStore, bundle: Bundle) -> Iterator[Traffic]:
    with Traffic(store, bundle).running() as traffic:
        yield traffic


def publish_again(server: RedisServer, bundle: Bundle) -> None:
    with open_backend(server.url) as backend:
        publish(bundle.folder, backend)


def page(bundle: Bundle, table: str, number: int) -> str:
    return page_key("torchrank", namespace(bundle.manifest), table, number)


def test_killed_and_restarted(redis_server: RedisServer, traffic: Traffic, bundle: Bundle) -> None:
    """It comes back empty, which must not pass for a table without ids, until the release is published again."""
    redis_server.stop()
    traffic.wait_until_degraded()
    redis_server.start()
    before = len(traffic.outcomes)
    traffic.wait_for("answers", lambda: len(traffic.outcomes) > before + 50)
    assert all(not one.whole for one in traffic.outcomes[before + 20 :]), "an empty server passed for the release"
    publish_again(redis_server, bundle)
    traffic.wait_until_whole()
    assert traffic.flagged[UNAVAILABLE] > 0
    assert not traffic.errors


def test_killed_and_restarted_with_its_data(bundle: Bundle) -> None:
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    try:
        with open_store(server.url, cache_bytes=25_000, degrade=DEFAULTS) as store:
            publish(bundle.folder, store.backend)
            with Traffic(store, bundle).running() as traffic:
                server.stop()
                traffic.wait_until_degraded()
                server.start()
                traffic.wait_until_whole()
                assert not traffic.errors
    finally:
        server.close()


@pytest.mark.parametrize("how", ["SIGSTOP", "CLIENT PAUSE"])
def test_paused_beyond_the_deadline(redis_server: RedisServer, traffic: Traffic, how: str) -> None:
    with redis_server.client() as client:
        if how == "SIGSTOP":
            redis_server.pause()
        else:
            client.execute_command("CLIENT PAUSE", 3000, "ALL")
        began = time.monotonic()
        traffic.wait_until_degraded()
        if how == "SIGSTOP":
            redis_server.resume()
        else:
            time.sleep(max(0.0, 3.0 - (time.monotonic() - began)))
    traffic.wait_until_whole()
    assert traffic.flagged[UNAVAILABLE] > 0


def test_connections_are_cut(redis_server: RedisServer, traffic: Traffic) -> None:
    """CLIENT KILL in the middle of traffic: a connection that dies is replaced within the look-up, or flagged."""
    with redis_server.client() as client:
        for _ in range(30):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            time.sleep(0.02)
    traffic.wait_until_whole()
    assert not traffic.errors


def test_pages_are_evicted(redis_server: RedisServer, traffic: Traffic, bundle: Bundle) -> None:
    """Somebody turns an eviction policy on: pages vanish, which is damage and not absence."""
    with redis_server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-random")
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 100_000)  # half of what the pages take
        client.set("filler", "x")
        traffic.wait_until_degraded()
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")
        client.delete("filler")
    publish_again(redis_server, bundle)
    traffic.wait_until_whole()
    assert traffic.flagged[UNAVAILABLE] > 0


def test_a_page_is_truncated(redis_server: RedisServer, traffic: Traffic, bundle: Bundle) -> None:
    with redis_server.client() as client:
        whole = client.get(page(bundle, "item", 1))
        assert isinstance(whole, bytes)
        client.set(page(bundle, "item", 1), whole[: len(whole) // 2 + 7])  # in the middle of a row
        traffic.wait_until_degraded()
        client.set(page(bundle, "item", 1), whole)
    traffic.wait_until_whole()
    assert traffic.flagged[UNAVAILABLE] > 0


def test_a_page_is_no_string(redis_server: RedisServer, traffic: Traffic, bundle: Bundle) -> None:
    with redis_server.client() as client:
        whole = client.get(page(bundle, "user", 0))
        assert isinstance(whole, bytes)
        client.delete(page(bundle, "user", 0))
        client.hset(page(bundle, "user", 0), "not", "a page")
        traffic.wait_until_degraded()
        client.set(page(bundle, "user", 0), whole)
    traffic.wait_until_whole()


def test_rows_of_the_release_before_stand_in(redis_server: RedisServer, tmp_path: Path) -> None:
    """previous, then default: the new release was looked at a little, the old one is in the cache as a whole."""
    old, new = (make_bundle(tmp_path / v, int(v), version=v, tables=TABLES) for v in "12")
    policy = DegradePolicy(("cache", "previous", "default"))
    with open_store(redis_server.url, cache_bytes=1_000_000, degrade=policy) as store:
        for one in (old, new):
            publish(one.folder, store.backend)
        store.lookup(old.name, {table.name: np.arange(table.rows) for table in TABLES})
        with Traffic(store, new, before=old).running() as traffic:
            redis_server.stop()
            traffic.wait_until_degraded()
            redis_server.start()
            for one in (old, new):
                publish_again(redis_server, one)
            traffic.wait_until_whole()
    assert traffic.flagged[STALE] > 0
    assert traffic.flagged[FOUND] > 0
    assert traffic.flagged[ABSENT] > 0
