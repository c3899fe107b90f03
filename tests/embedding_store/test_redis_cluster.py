"""A real cluster of six nodes: slots on the move, fail-over, silent nodes, replicas that lack pages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from numpy.typing import NDArray
from redis.crc import key_slot

from embedding_store.backend import Backend, namespace
from embedding_store.batch import FetchedRows, batch_of
from embedding_store.codec import decode
from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import FOUND, UNAVAILABLE
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.redis_cluster import ClusterReader
from embedding_store.redis_keys import Record, page_key
from embedding_store.redis_read import RedisReader
from embedding_store.redis_topology import Topology
from embedding_store.redis_url import parse_redis_url
from embedding_store.talks import Talks
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer
from tests.tcp_proxy import TcpProxy

ROWS, DIM = 6000, 16  # 124 rows a page: 49 pages
SECONDS = 5.0  # within which service must resume


@pytest.fixture
def cluster() -> Iterator[RedisCluster]:
    """Of the test's own, to be damaged."""
    cluster = RedisCluster()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=3, tables=(TestTable("item", "fp32", rows=ROWS, dim=DIM),))


@pytest.fixture
def backend(cluster: RedisCluster, bundle: Bundle) -> Iterator[Backend]:
    """With the bundle published, on the replicas too."""
    with open_backend(cluster.url) as backend:
        publish_everywhere(cluster, bundle, backend)
        yield backend


def publish_everywhere(cluster: RedisCluster, bundle: Bundle, backend: Backend) -> None:
    publish(bundle.folder, backend)
    for number in range(cluster.masters):
        with cluster.client(number) as client:
            assert client.wait(1, 5000) == 1


def fetch_all(backend: Backend, bundle: Bundle, timeout: float) -> FetchedRows:
    """Every row of the table; those that are said to be found are checked."""
    ids = np.arange(ROWS)
    fetched = backend.fetch(bundle.name, batch_of(bundle.manifest, {"item": ids}), timeout=timeout)
    found = fetched.status == FOUND
    assert (found | (fetched.status == UNAVAILABLE)).all()
    assert found.all() == (fetched.error is None)
    values = decode("fp32", fetched.rows.reshape(ROWS, -1))
    np.testing.assert_array_equal(values[found], bundle.values["item"][:ROWS][found])
    return fetched


def page_of(bundle: Bundle) -> NDArray[np.int64]:
    return np.arange(ROWS) // bundle.manifest.tables[0].page_rows


def key_of(bundle: Bundle, page: int) -> str:
    return page_key("torchrank", namespace(bundle.manifest), "item", page)


def slots_of_rows(bundle: Bundle) -> NDArray[np.int64]:
    """Of each row's page, by redis-py."""
    return np.array([key_slot(key_of(bundle, page).encode()) for page in range(page_of(bundle)[-1] + 1)])[
        page_of(bundle)
    ]


def rows_of(cluster: RedisCluster, bundle: Bundle, number: int) -> NDArray[np.bool_]:
    """bool [ROWS]: whose page master `number` was given."""
    slots = cluster.slots_of(number)
    found = slots_of_rows(bundle)
    mine: NDArray[np.bool_] = (found >= slots[0]) & (found <= slots[-1])
    assert mine.any()
    assert not mine.all()
    return mine


def test_slots_that_move_while_rows_are_read(cluster: RedisCluster, bundle: Bundle, backend: Backend) -> None:
    assert fetch_all(backend, bundle, timeout=60).error is None  # kernels are compiled before anything moves
    stop = threading.Event()
    failures: list[object] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            fetched = fetch_all(backend, bundle, timeout=10)
            failures.extend([fetched.error] if fetched.error else [])
            reads += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        moving = sorted(set(slots_of_rows(bundle)[rows_of(cluster, bundle, 0)].tolist()))
        for slot in moving:
            move_slot(cluster, slot, source=0, target=1)
    finally:
        stop.set()
        reader.join()
    assert failures == []
    assert reads > len(moving) // 4
    with cluster.client(1) as client:
        assert client.info("commandstats")["cmdstat_asking"]["calls"] > 0
    assert fetch_all(backend, bundle, timeout=10).error is None
    with open_backend(cluster.url) as other:
        assert fetch_all(other, bundle, timeout=10).error is None


def move_slot(cluster: RedisCluster, slot: int, source: int, target: int) -> None:
    """As `redis-cli --cluster reshard` does, with time in between for somebody to ask either node."""
    with cluster.client(source) as old, cluster.client(target) as new:
        new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", cluster.node_id(source))
        old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", cluster.node_id(target))
        keys = old.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
        assert keys
        port = cluster.nodes[target].port
        old.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "KEYS", *keys)
        time.sleep(0.02)
        for client in (new, old):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", cluster.node_id(target))


def test_a_master_is_killed_and_its_replica_takes_over(cluster: RedisCluster, bundle: Bundle, backend: Backend) -> None:
    assert fetch_all(backend, bundle, timeout=10).error is None
    gone = rows_of(cluster, bundle, 0)
    cluster.nodes[0].stop()
    promoted = None
    unavailable = 0
    while True:
        if promoted is None and cluster.is_master(3):
            promoted = time.monotonic()
        fetched = fetch_all(backend, bundle, timeout=1)
        assert (fetched.status[~gone] == FOUND).all()
        if fetched.error is None:
            break
        unavailable += 1
        assert (fetched.status[gone] == UNAVAILABLE).all()
        assert f"redis://127.0.0.1:{cluster.nodes[0].port}/0 cannot be reached" in str(fetched.error)
        assert promoted is None or time.monotonic() - promoted < SECONDS
        time.sleep(0.02)
    assert unavailable > 0


def test_a_silent_node_takes_no_rows_of_others_with_it(cluster: RedisCluster, bundle: Bundle, backend: Backend) -> None:
    """SIGSTOP: connections are accepted, nothing is answered. Its replica is stopped too, so that none takes over."""
    assert fetch_all(backend, bundle, timeout=10).error is None
    gone = rows_of(cluster, bundle, 0)
    for number in (0, 3):
        cluster.nodes[number].pause()
    address = f"redis://127.0.0.1:{cluster.nodes[0].port}/0"
    told = []
    for _ in range(12):
        fetched = fetch_all(backend, bundle, timeout=0.2)
        assert (fetched.status[~gone] == FOUND).all()
        assert (fetched.status[gone] == UNAVAILABLE).all()
        told.append(str(fetched.error))
    assert all(f"{address} did not answer within" in line for line in told)
    # Five, of which readings of the topology from this very node, which are no fetches, may be some.
    assert any("not asked now, after 5 failures in a row" in line for line in told)
    stats = {node.address: node for node in backend.nodes()}
    assert stats[address].open
    assert stats[address].failures > 0
    assert stats[address].fetches < 12
    assert not any(node.open for name, node in stats.items() if name != address)
    for number in (0, 3):
        cluster.nodes[number].resume()
    resumed = time.monotonic()
    while fetch_all(backend, bundle, timeout=1).error is not None:
        assert time.monotonic() - resumed < SECONDS
        time.sleep(0.02)


def test_a_release_that_was_never_read_is_read_within_the_timeout(
    cluster: RedisCluster, bundle: Bundle, backend: Backend
) -> None:
    """Where the master with the releases' keys is silent. Its replica is too, so that none takes over."""
    slot = key_slot(b"{torchrank}:releases")
    number = next(number for number in range(cluster.masters) if slot in cluster.slots_of(number))
    for node in (number, cluster.masters + number):
        cluster.nodes[node].pause()
    with open_backend(cluster.url) as other:
        silent = rf"redis://127\.0\.0\.1:{cluster.nodes[number].port}/0 did not answer within 0\.\d+ s"
        with pytest.raises(StoreUnavailable, match=silent):
            other.manifest(bundle.name, timeout=0.5)
        for node in (number, cluster.masters + number):
            cluster.nodes[node].resume()
        assert other.manifest(bundle.name, timeout=10) == bundle.manifest


def test_a_release_s_record_moves_while_it_is_read(cluster: RedisCluster, bundle: Bundle, backend: Backend) -> None:
    slot = key_slot(b"{torchrank}:releases")
    source = next(number for number in range(cluster.masters) if slot in cluster.slots_of(number))
    target = (source + 1) % cluster.masters
    stop = threading.Event()
    found: list[object] = []

    def read() -> None:
        while not stop.is_set():
            backend.forget(bundle.name)
            found.append(backend.manifest(bundle.name, timeout=10))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(3):
            move_slot(cluster, slot, source, target)
            move_slot(cluster, slot, target, source)
    finally:
        stop.set()
        reader.join()
    assert len(found) > 10
    assert all(manifest == bundle.manifest for manifest in found)
    with cluster.client(target) as client:
        assert client.info("commandstats")["cmdstat_asking"]["calls"] > 0


@pytest.fixture
def releases_slot() -> int:
    return key_slot(b"{torchrank}:releases")


def test_a_release_s_record_is_read_after_a_fail_over(
    cluster: RedisCluster, bundle: Bundle, backend: Backend, releases_slot: int
) -> None:
    """Also where nothing but records was ever read, and the breaker of the master that is gone is open."""
    number = next(number for number in range(cluster.masters) if releases_slot in cluster.slots_of(number))
    with open_backend(cluster.url) as other:
        assert other.manifest(bundle.name, timeout=10) == bundle.manifest
        cluster.nodes[number].stop()
        address = f"redis://127.0.0.1:{cluster.nodes[number].port}/0"
        while not any(node.open for node in other.nodes() if node.address == address):
            other.forget(bundle.name)
            with pytest.raises(StoreUnavailable):
                other.manifest(bundle.name, timeout=0.05)
        cluster.wait(lambda: cluster.is_master(cluster.masters + number), "fail-over")
        promoted = time.monotonic()
        while True:
            other.forget(bundle.name)
            try:
                assert other.manifest(bundle.name, timeout=0.5) == bundle.manifest
                break
            except StoreUnavailable:
                assert time.monotonic() - promoted < SECONDS
                time.sleep(0.02)


def test_a_release_s_record_whose_slot_nobody_serves_for_a_moment(
    cluster: RedisCluster, bundle: Bundle, releases_slot: int
) -> None:
    number = next(number for number in range(cluster.masters) if releases_slot in cluster.slots_of(number))
    with open_backend(cluster.url) as backend:
        publish(bundle.folder, backend)
        with cluster.client(number) as client:
            value = client.dump("{torchrank}:releases")
    for node in range(len(cluster.nodes)):
        with cluster.client(node) as client:
            client.execute_command("CLUSTER DELSLOTS", releases_slot)

    def give_back() -> None:
        with cluster.client(number) as client:
            client.execute_command("CLUSTER ADDSLOTS", releases_slot)
            if not client.exists("{torchrank}:releases"):
                client.restore("{torchrank}:releases", 0, value)

    with open_backend(cluster.url) as backend:
        with pytest.raises(StoreUnavailable, match=f"no node serves slot {releases_slot}|CLUSTERDOWN"):
            backend.manifest(bundle.name, timeout=0.3)
        helper = threading.Timer(0.1, give_back)
        helper.start()
        assert backend.manifest(bundle.name, timeout=10) == bundle.manifest
        helper.join()


def test_replicas_are_read_and_their_gaps_filled_by_masters(cluster: RedisCluster, bundle: Bundle) -> None:
    with open_backend(
        f"{cluster.url}&replicas=yes" if "?" in cluster.url else f"{cluster.url}?replicas=yes"
    ) as backend:
        publish_everywhere(cluster, bundle, backend)
        assert fetch_all(backend, bundle, timeout=10).error is None
        replicas = {f"redis://127.0.0.1:{node.port}/0" for node in cluster.nodes[cluster.masters :]}
        assert {node.address for node in backend.nodes() if node.fetches} == replicas

        page = int(page_of(bundle)[rows_of(cluster, bundle, 1)][0])
        with cluster.client(4) as replica, cluster.client(1) as master:
            replica.config_set("replica-ignore-maxmemory", "no")
            replica.config_set("maxmemory-policy", "allkeys-random")
            replica.config_set("maxmemory", "1")
            cluster.wait(lambda: replica.dbsize() == 0, "eviction of all pages from the replica")
            assert fetch_all(backend, bundle, timeout=10).error is None
            assert master.delete(key_of(bundle, page)) == 1
        fetched = fetch_all(backend, bundle, timeout=10)
        np.testing.assert_array_equal(fetched.status == UNAVAILABLE, page_of(bundle) == page)
        assert f"has lost page {page} of table 'item' of demo@1" in str(fetched.error)


def test_a_replica_that_fails_is_stood_in_for_by_its_master(cluster: RedisCluster, bundle: Bundle) -> None:
    with open_backend(f"{cluster.url}?replicas=yes") as backend:
        publish_everywhere(cluster, bundle, backend)
        assert fetch_all(backend, bundle, timeout=10).error is None
        cluster.nodes[3].stop()
        for _ in range(10):
            assert fetch_all(backend, bundle, timeout=10).error is None


def test_a_silent_replica_leaves_time_for_its_master(cluster: RedisCluster, bundle: Bundle) -> None:
    with open_backend(f"{cluster.url}?replicas=yes") as backend:
        publish_everywhere(cluster, bundle, backend)
        assert fetch_all(backend, bundle, timeout=10).error is None
        cluster.nodes[3].pause()
        for _ in range(3):
            assert fetch_all(backend, bundle, timeout=1).error is None


def test_a_replica_that_lacks_pages_and_breaks_off(cluster: RedisCluster, bundle: Bundle) -> None:
    """What it has said to lack before is asked of its master as well."""
    with (
        TcpProxy(cluster.nodes[3].port) as proxy,
        cluster.client(0) as master,
        cluster.client(3) as replica,
        open_backend(f"redis+cluster://127.0.0.1:{cluster.nodes[0].port}?replicas=yes") as backend,
    ):
        replica.config_set("cluster-announce-port", proxy.port)
        cluster.wait(
            lambda: any(node[1] == proxy.port for part in slot_table(master) for node in part[2:]), "announced port"
        )
        publish_everywhere(cluster, bundle, backend)
        replica.config_set("replica-ignore-maxmemory", "no")
        replica.config_set("maxmemory-policy", "allkeys-random")
        replica.config_set("maxmemory", "1")
        cluster.wait(lambda: replica.dbsize() == 0, "eviction of all pages from the replica")
        backend.manifest(bundle.name)
        proxy.cut_after = 1000  # of some 1,700 replies of 6 bytes
        assert fetch_all(backend, bundle, timeout=10).error is None
        assert proxy.cuts == 1


def test_damaged_rows_of_a_replica_are_asked_of_its_master(cluster: RedisCluster, bundle: Bundle) -> None:
    with (
        TcpProxy(cluster.nodes[3].port) as proxy,
        cluster.client(0) as master,
        cluster.client(3) as replica,
        open_backend(f"redis+cluster://127.0.0.1:{cluster.nodes[0].port}?replicas=yes") as backend,
    ):
        replica.config_set("cluster-announce-port", proxy.port)
        cluster.wait(
            lambda: any(node[1] == proxy.port for part in slot_table(master) for node in part[2:]), "announced port"
        )
        publish_everywhere(cluster, bundle, backend)
        backend.manifest(bundle.name)
        rows = bundle.values["item"][:ROWS].astype("<f4")
        for row in np.flatnonzero(rows_of(cluster, bundle, 0))[:100]:
            proxy.changed[rows[row, :8].tobytes()] = rows[row, 8:].tobytes()
        fetched = fetch_all(backend, bundle, timeout=10)
        assert fetched.error is None
        assert proxy.changes > 50


def slot_table(client: redis.Redis) -> list[list[Any]]:
    """CLUSTER SLOTS as it is: redis-py makes a dictionary of it."""
    client.set_response_callback("CLUSTER SLOTS", lambda reply, **_: reply)
    return list(client.execute_command("CLUSTER SLOTS"))


def test_a_node_that_was_taken_out_tells_nothing(cluster: RedisCluster, bundle: Bundle) -> None:
    """The only one that the URL names; the others are known by then."""
    with open_backend(f"redis+cluster://127.0.0.1:{cluster.nodes[3].port}") as backend, cluster.client(3) as client:
        publish_everywhere(cluster, bundle, backend)
        assert fetch_all(backend, bundle, timeout=10).error is None
        client.execute_command("CLUSTER RESET HARD")
        cluster.nodes[1].stop()  # so that the slots are asked for again
        cluster.wait(lambda: fetch_all(backend, bundle, timeout=1).error is None, "service after the fail-over")


def test_who_saw_the_same_change_reads_the_topology_once(cluster: RedisCluster) -> None:
    topology = Topology(parse_redis_url(cluster.url))

    def calls() -> int:
        found = [cluster.client(number).info("commandstats") for number in range(len(cluster.nodes))]
        return sum(one.get("cmdstat_cluster|slots", {}).get("calls", 0) for one in found)

    def refresh(since: float) -> None:
        talks = Talks()
        talks.start(topology.refresh(time.monotonic() + 10, since))
        talks.run()

    before, seen = calls(), time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(refresh, [seen] * 100))
    assert calls() - before == 1
    refresh(time.monotonic())
    assert calls() - before == 2
    topology.close()


def test_a_slot_that_nobody_serves_for_a_moment(cluster: RedisCluster, bundle: Bundle, backend: Backend) -> None:
    assert fetch_all(backend, bundle, timeout=10).error is None
    slot = int(slots_of_rows(bundle)[rows_of(cluster, bundle, 2)][0])
    mine = slots_of_rows(bundle) == slot
    for number in range(6):
        with cluster.client(number) as client:
            client.execute_command("CLUSTER DELSLOTS", slot)
    fetched = fetch_all(backend, bundle, timeout=10)
    np.testing.assert_array_equal(fetched.status == UNAVAILABLE, mine)
    assert "CLUSTERDOWN Hash slot not served" in str(fetched.error) or f"no node serves slot {slot}" in str(
        fetched.error
    )

    def give_back() -> None:
        time.sleep(0.1)
        with cluster.client(2) as client:
            client.execute_command("CLUSTER ADDSLOTS", slot)

    helper = threading.Thread(target=give_back)
    helper.start()
    assert fetch_all(backend, bundle, timeout=10).error is None
    helper.join()


def test_a_url_of_the_other_kind_is_told(cluster: RedisCluster, bundle: Bundle, redis_server: RedisServer) -> None:
    node = cluster.nodes[0]
    record = Record(namespace(bundle.manifest), bundle.manifest)
    batch = batch_of(bundle.manifest, {"item": np.arange(ROWS)})
    with RedisReader(parse_redis_url(node.tcp_url)) as reader:
        error = str(reader.fetch(record, batch).error)
        assert "it is a node of a cluster: the store URL must be redis+cluster://" in error
    with ClusterReader(parse_redis_url(f"redis+cluster://127.0.0.1:{redis_server.port}")) as cluster_reader:
        fetched = cluster_reader.fetch(record, batch)
        assert (fetched.status == UNAVAILABLE).all()
        assert "answered: ERR This instance has cluster support disabled" in str(fetched.error)


def test_a_cluster_that_is_gone(cluster: RedisCluster, bundle: Bundle) -> None:
    with open_backend(cluster.url) as backend:
        publish_everywhere(cluster, bundle, backend)
        backend.manifest(bundle.name)
        for node in cluster.nodes:
            node.stop()
        fetched = fetch_all(backend, bundle, timeout=0.5)
        assert (fetched.status == UNAVAILABLE).all()
        assert "no node tells who serves which slot" in str(fetched.error)
        with pytest.raises(StoreUnavailable, match=r"redis\+cluster://127\.0\.0\.1:\d+,.* cannot be reached"):
            backend.releases()
