"""A store that will not take a release says so before anything is written, and what to set. Then that is set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest
import redis

from embedding_store.byte_sizes import parse_size
from embedding_store.errors import StoreNotReady, StoreUnavailable
from embedding_store.gc import collect
from embedding_store.open import open_backend
from embedding_store.publish import publish, publish_and_activate
from embedding_store.releases import list_releases
from tests.embedding_store.bundles import Bundle, TestTable, check_release, make_bundle
from tests.embedding_store.conftest import StoreUrl
from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer

TABLES = (TestTable("item", "fp32", rows=20_000, dim=16, hot=100),)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", 2, tables=TABLES)


@pytest.fixture
def server() -> Iterator[Callable[..., RedisServer]]:
    """server("--option", "value"): closed at the end."""
    with ExitStack() as stack:

        def start(*options: str) -> RedisServer:
            started = RedisServer(*options)
            stack.callback(started.close)
            return started

        yield start


def refused(bundle: Bundle, url: str, message: str) -> str:
    """That nothing is left of an attempt to publish."""
    with open_backend(url) as backend, pytest.raises(StoreNotReady, match=message) as caught:
        publish(bundle.folder, backend)
    return str(caught.value)


def test_an_eviction_policy(server: Callable[..., RedisServer], bundle: Bundle) -> None:
    redis_server = server("--maxmemory-policy", "allkeys-lru", "--maxmemory", "100mb")
    refused(bundle, redis_server.url, r"maxmemory-policy is allkeys-lru.*CONFIG SET maxmemory-policy noeviction")
    assert redis_server.client().dbsize() == 0
    redis_server.client().config_set("maxmemory-policy", "noeviction")
    with open_backend(redis_server.url) as backend:
        publish(bundle.folder, backend)
        check_release(backend, bundle)


def test_too_little_memory_and_as_much_as_the_message_asks_for(
    server: Callable[..., RedisServer], bundle: Bundle, tmp_path: Path
) -> None:
    redis_server = server("--maxmemory", "2200kb")
    message = refused(bundle, redis_server.url, r"no memory left for writing demo@1: it takes 3\.\d+MiB")
    asked = re.search(r"raise maxmemory to ([\d.]+MiB) at least", message)
    assert asked is not None
    assert redis_server.client().dbsize() == 0
    redis_server.client().config_set("maxmemory", parse_size(asked[1]))
    with open_backend(redis_server.url) as backend:
        publish(bundle.folder, backend)
        check_release(backend, bundle)
    second = make_bundle(tmp_path / "second", 3, version="2", tables=TABLES)
    refused(second, redis_server.url, r"no memory left for writing demo@2: .*torchrank gc")


def test_what_is_written_already_needs_no_memory_again(server: Callable[..., RedisServer], tmp_path: Path) -> None:
    tables = tuple(TestTable(name, "fp32", rows=20_000, dim=16) for name in ("a", "b", "c"))
    made = make_bundle(tmp_path / "bundle", 3, tables=tables)
    redis_server = server()

    class Interrupted(Exception):
        pass

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "verified b":
            raise Interrupted

    with open_backend(redis_server.url) as backend:
        with pytest.raises(Interrupted):
            publish(made.folder, backend, progress=interrupt)
        used = redis_server.client().info("memory")["used_memory"]
        redis_server.client().config_set("maxmemory", used + 4_000_000)
        publish(made.folder, backend)
        check_release(backend, made)


def test_memory_that_runs_out_all_the_same(redis_server: RedisServer, bundle: Bundle, tmp_path: Path) -> None:
    """Others may write too. What is active stays, and publishing goes on when there is room."""
    old = make_bundle(tmp_path / "old", 1, version="0", tables=TABLES)
    client = redis_server.client()

    def fill(step: str, done: int, total: int) -> None:
        if step == "writing item":
            client.config_set("maxmemory", client.info("memory")["used_memory"] - 1)

    with open_backend(redis_server.url) as backend:
        publish_and_activate(old.folder, backend)
        with pytest.raises(StoreNotReady, match="has no memory left for writing: raise maxmemory, or remove"):
            publish_and_activate(bundle.folder, backend, progress=fill)
        check_release(backend, old)
        assert backend.active("demo") == "demo@0"
        client.config_set("maxmemory", 0)
        publish_and_activate(bundle.folder, backend)
        check_release(backend, bundle)


def test_a_replica_names_its_master(server: Callable[..., RedisServer], bundle: Bundle) -> None:
    master = server()
    replica = server("--replicaof", "127.0.0.1", str(master.port))
    refused(bundle, replica.url, f"is a read-only replica of 127.0.0.1:{master.port}: publish there")


def test_a_master_without_the_replicas_that_it_wants(server: Callable[..., RedisServer], bundle: Bundle) -> None:
    redis_server = server("--min-replicas-to-write", "1")
    refused(bundle, redis_server.url, "does not take writes: .*NOREPLICAS|Not enough good replicas")


def grant(clients: list[redis.Redis], user: str, rights: str) -> None:
    for client in clients:
        client.execute_command("ACL", "SETUSER", user, "reset", "on", ">secret", *rights.split())


def rights_in(message: str) -> str:
    found = re.search(r"it needs: ACL SETUSER NAME (.*)$", message)
    assert found is not None, message
    return found[1]


@pytest.mark.parametrize("kind", ["redis", "redis+cluster"])
def test_a_user_without_rights_is_told_which_and_with_those_can_do_all(
    kind: str, url_of: StoreUrl, request: pytest.FixtureRequest, bundle: Bundle, tmp_path: Path
) -> None:
    scheme, _, rest = url_of(kind).partition("://")
    url = f"{scheme}://publisher:secret@{rest}"
    if kind == "redis+cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        clients = [cluster.client(number) for number in range(len(cluster.nodes))]
    else:
        clients = [request.getfixturevalue("redis_server").client()]
    grant(clients, "publisher", "~* +hget +select +cluster +command +info")
    grant(clients, "publisher", rights_in(refused(bundle, url, "does not let this user publish")))
    with open_backend(url) as backend:
        publish_and_activate(bundle.folder, backend)
        for version in ("2", "3"):
            later = make_bundle(tmp_path / version, 3, version=version, tables=TABLES)
            publish_and_activate(later.folder, backend)
        assert backend.pin("me", ["demo@3"], 60) == {"demo@3"}
        assert [state.pinned_by for state in list_releases(backend)] == [(), (), ("me",)]
        assert [decision.removed for decision in collect(backend, grace=0)] == [True, False, False]
    with open_backend(url_of(kind)) as backend:
        check_release(backend, later)


def test_who_may_only_read_cannot_pin(redis_server: RedisServer, bundle: Bundle) -> None:
    with open_backend(redis_server.url) as backend:
        publish(bundle.folder, backend)
    grant([redis_server.client()], "reader", "~* +@read +time")
    with open_backend(redis_server.url.replace("://", "://reader:secret@")) as backend:
        check_release(backend, bundle)
        with pytest.raises(StoreUnavailable, match="does not let this user do that"):
            backend.pin("me", ["demo@1"], 60)


def test_a_node_of_a_cluster_is_not_the_store(redis_cluster: RedisCluster, bundle: Bundle) -> None:
    url = f"redis://127.0.0.1:{redis_cluster.nodes[0].port}"
    refused(bundle, url, r"is a node of a cluster, not the store: use redis\+cluster://")


def test_a_cluster_with_a_slot_that_nobody_serves(bundle: Bundle) -> None:
    cluster = RedisCluster()
    try:
        for number in range(len(cluster.nodes)):
            cluster.client(number).execute_command("CLUSTER DELSLOTS", 7)
        refused(bundle, cluster.url, "16383 of 16384 slots are served; .*redis-cli --cluster check")
        cluster.client(0).execute_command("CLUSTER ADDSLOTS", 7)
        cluster.wait(lambda: cluster.client(2).cluster("INFO")["cluster_slots_ok"] == "16384", "slot")
        cluster.client(1).config_set("maxmemory-policy", "volatile-lru")
        refused(bundle, cluster.url, f"node 127.0.0.1:{cluster.nodes[1].port}: maxmemory-policy is volatile-lru")
        cluster.client(1).config_set("maxmemory-policy", "noeviction")
        used = cluster.client(2).info("memory")["used_memory"]
        cluster.client(2).config_set("maxmemory", used + 100_000)
        refused(bundle, cluster.url, f"node 127.0.0.1:{cluster.nodes[2].port} has no memory left for writing demo@1")
        cluster.client(2).config_set("maxmemory", 0)
        with open_backend(cluster.url) as backend:
            publish(bundle.folder, backend)
            check_release(backend, bundle)
    finally:
        cluster.close()


class TestFiles:
    def test_a_release_that_the_file_system_has_no_room_for(self, url_of: StoreUrl, bundle: Bundle) -> None:
        table = msgspec.structs.replace(bundle.manifest.tables[0], rows=2**50)
        with open_backend(url_of("memmap")) as backend:
            backend.create()
            with pytest.raises(StoreNotReady, match=r"has no room for demo@1: it takes 6.76e\+04TiB more, and .* free"):
                backend.preflight(msgspec.structs.replace(bundle.manifest, tables=(table,)))
            assert backend.inventory() == []

    def test_a_disk_that_runs_full_all_the_same(self, url_of: StoreUrl, bundle: Bundle, tmp_path: Path) -> None:
        """By a limit on the size of files, which needs no file system of our own; the kernel's answer is EFBIG."""
        old = make_bundle(tmp_path / "old", 1, version="0", tables=TABLES)
        with open_backend(url_of("memmap")) as backend:
            publish_and_activate(old.folder, backend)
            script = (
                "import resource, sys; from torchrank.cli import main; "
                "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000)); main()"
            )
            command = [sys.executable, "-c", script, "publish", str(bundle.folder), "--store", url_of("memmap")]
            failed = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
            assert failed.returncode == 1
            assert "File too large: free some room, or remove old releases (torchrank gc)" in failed.stderr
            assert failed.stderr.count("\n") == 1
            check_release(backend, old)
            assert backend.active("demo") == "demo@0"
            assert list(backend.releases()) == ["demo@0"]
            publish_and_activate(bundle.folder, backend)
            check_release(backend, bundle)

    def test_a_directory_of_another_user(self, open_to_all: Path) -> None:
        made = make_bundle(open_to_all / "bundle", 1, tables=TABLES)
        store = open_to_all / "store"
        with open_backend(f"memmap://{store}") as backend:
            publish(make_bundle(open_to_all / "old", 1, version="0", tables=TABLES).folder, backend)
            store.chmod(0o555)
            with as_nobody(), pytest.raises(StoreNotReady, match=r"\(uid \d+\) may not write into .*store: give it"):
                publish(made.folder, backend)
            with as_nobody(), pytest.raises(StoreUnavailable, match=r"store/pins: Permission denied: this user"):
                backend.pin("me", ["demo@0"], 60)
            store.chmod(0o755)
            publish(made.folder, backend)
            check_release(backend, made)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """pytest's own folders are their owner's alone."""
    with tempfile.TemporaryDirectory(prefix="torchrank-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """root may write everywhere; others are who they are."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
