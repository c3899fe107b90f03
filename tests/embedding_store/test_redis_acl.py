"""Two users of a real Redis: one who publishes, one who only looks up, each with no more rights than it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import redis

from embedding_store.backend import namespace
from embedding_store.batch import batch_of
from embedding_store.errors import StoreError, StoreNotReady
from embedding_store.gc import collect
from embedding_store.open import open_backend, open_store
from embedding_store.publish import publish
from embedding_store.redis_keys import page_key
from embedding_store.redis_preflight import publisher_rights
from embedding_store.redis_rights import reader_rights
from embedding_store.releases import activate, list_releases, rollback
from tests.embedding_store.bundles import Bundle, TestTable, check_rows, fetch, make_bundle
from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer

PREFIX = "shop"
TABLES = (TestTable("item", "fp16", rows=5000, dim=16, hot=50), TestTable("raw", "fp32", rows=300, dim=4, sparse=True))


class Guarded:
    """A store with the users `publisher` and `sidecar`, whose passwords are their names."""

    def __init__(self, url: str, servers: Sequence[redis.Redis], *, cluster: bool) -> None:
        self._url = url
        for server in servers:
            with server:
                for name, rights in (
                    ("publisher", publisher_rights(PREFIX, cluster=cluster)),
                    ("sidecar", reader_rights(PREFIX, cluster=cluster)),
                ):
                    server.execute_command("ACL", "SETUSER", name, "on", f">{name}", *rights.split())

    def url(self, user: str) -> str:
        scheme, _, place = self._url.partition("://")
        return f"{scheme}://{user}:{user}@{place}?prefix={PREFIX}"


@pytest.fixture(params=["redis", "redis+cluster"])
def guarded(request: pytest.FixtureRequest) -> Iterator[Guarded]:
    server = RedisCluster() if request.param == "redis+cluster" else RedisServer()
    try:
        if isinstance(server, RedisCluster):
            yield Guarded(server.url, [server.client(number) for number in range(len(server.nodes))], cluster=True)
        else:
            yield Guarded(f"{server.tcp_url}/1", [server.client()], cluster=False)
    finally:
        server.close()


@pytest.fixture
def bundles(tmp_path: Path) -> list[Bundle]:
    return [make_bundle(tmp_path / version, int(version), version=version, tables=TABLES) for version in ("1", "2")]


def test_one_publishes_and_the_other_looks_up(guarded: Guarded, bundles: list[Bundle]) -> None:
    with open_backend(guarded.url("publisher")) as publisher, open_store(guarded.url("sidecar")) as store:
        for bundle in bundles:
            publish(bundle.folder, publisher)
            activate(publisher, bundle.name)
        assert rollback(publisher, "demo") == ("demo@2", "demo@1")

        first = bundles[0]
        assert store.manifest(model="demo") == first.manifest
        store.warm(first.name)
        ids = {"item": np.arange(-5, 5005), "raw": np.array([*first.raw["raw"], 7])}
        for name, (rows, found) in fetch(store.backend, first.name, ids).items():
            check_rows(first, name, ids[name], rows, found)
        assert [state.name for state in list_releases(store.backend)] == ["demo@1", "demo@2"]
        assert store.backend.pin("host-1", ["demo@2"], 60) == {"demo@2"}
        assert publisher.pins() == {"demo@2": ["host-1"]}
        assert not any(decision.removed for decision in collect(publisher, keep=0, grace=0))
        store.backend.pin("host-1", [], 60)
        assert [decision.release for decision in collect(publisher, keep=0, grace=0) if decision.removed] == ["demo@2"]


def test_who_looks_up_can_change_nothing_but_pins(guarded: Guarded, bundles: list[Bundle]) -> None:
    with open_backend(guarded.url("publisher")) as publisher:
        publish(bundles[0].folder, publisher)
        activate(publisher, "demo@1")
    with open_backend(guarded.url("sidecar")) as reader:
        with pytest.raises(StoreNotReady, match="permission"):
            publish(bundles[1].folder, reader)
        with pytest.raises(StoreError, match="permission"):
            reader.set_history("demo", ("demo@1",), ())
        control = reader.control  # type: ignore[attr-defined]
        page = page_key(PREFIX, namespace(bundles[0].manifest), "item", 0)
        for command in (
            ("SET", page, "x"), ("DEL", page), ("UNLINK", page), ("GETDEL", page), ("EXPIRE", page, "1"),
            ("HSET", "{shop}:releases", "demo@1", "x"), ("HDEL", "{shop}:releases", "demo@1"),
            ("HSET", "{shop}:active", "demo", "[]"), ("GET", "another:key"), ("HGET", "another:key", "x"),
        ):  # fmt: skip
            with pytest.raises(redis.exceptions.NoPermissionError):
                control.execute_command(*command)
        ids = np.arange(5000)
        rows, found = fetch(reader, "demo@1", {"item": ids})["item"]
        check_rows(bundles[0], "item", ids, rows, found)


def test_a_user_without_rights_is_told_which(redis_server: RedisServer, bundles: list[Bundle]) -> None:
    guarded = Guarded(redis_server.tcp_url, [redis_server.client()], cluster=False)
    with open_backend(guarded.url("publisher")) as publisher:
        publish(bundles[0].folder, publisher)
    with open_backend(guarded.url("sidecar")) as reader:
        manifest = reader.manifest("demo@1")
        with redis_server.client() as client:
            client.execute_command("ACL", "SETUSER", "sidecar", "-getrange")
        fetched = reader.fetch("demo@1", batch_of(manifest, {"item": np.arange(10)}))
        assert fetched.status.tolist() == [2] * 10
        assert "answered: NOPERM" in str(fetched.error)
        assert f"who reads needs: ACL SETUSER NAME {reader_rights(PREFIX)}" in str(fetched.error)
