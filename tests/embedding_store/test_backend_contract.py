"""What every backend must do. A new one joins by a line in `BACKENDS`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedding_store.backend import Backend, namespace
from embedding_store.bundle import read_chunks
from embedding_store.errors import (
    InvalidRelease,
    ReleaseConflict,
    StoreUnavailable,
    UnknownRelease,
    UnknownTable,
)
from embedding_store.open import open_backend
from embedding_store.publish import Published, publish
from embedding_store.releases import activate, list_releases, rollback
from tests.embedding_store.bundles import Bundle, TestTable, check_rows, fetch, make_bundle
from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer

BACKENDS = ("memmap", "redis+unix", "redis", "redis+cluster")


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memmap":
        return f"memmap://{tmp_path / 'store'}"
    if request.param == "redis+cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        return f"{cluster.url}?prefix={secrets.token_hex(8)}"
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url if request.param == "redis+unix" else f"{server.tcp_url}/3?prefix=shop"


@pytest.fixture
def backend(url: str) -> Iterator[Backend]:
    with open_backend(url) as backend:
        yield backend


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=7)


class TestBackendContract:
    def test_a_published_release_gives_back_every_row(self, backend: Backend, bundle: Bundle) -> None:
        assert publish(bundle.folder, backend) == Published(bundle.manifest, new=True)
        ids = {table.name: np.arange(table.rows, dtype=np.int64) for table in bundle.manifest.tables}
        fetched = fetch(backend, bundle.name, ids)
        assert list(fetched) == list(ids)
        for name, (rows, found) in fetched.items():
            check_rows(bundle, name, ids[name], rows, found)

    @pytest.mark.parametrize("seed", range(4))
    def test_random_ids_in_any_order_known_or_not(self, backend: Backend, bundle: Bundle, seed: int) -> None:
        publish(bundle.folder, backend)
        rng = np.random.default_rng(seed)
        extremes = [-1, -(2**63), 2**63 - 1, 2**31, 2**32]
        ids = {}
        for table in bundle.manifest.tables:
            edges = [0, table.rows - 1, table.rows, table.page_rows - 1, table.page_rows, table.pages * table.page_rows]
            some = rng.integers(-table.rows, 2 * table.rows, rng.integers(0, 300))
            ids[table.name] = rng.permutation(np.unique(np.concatenate((some, extremes, edges)).astype(np.int64)))
        for name, (rows, found) in fetch(backend, bundle.name, ids, timeout=10).items():
            check_rows(bundle, name, ids[name], rows, found)

    def test_no_ids_and_only_absent_ids(self, backend: Backend, bundle: Bundle) -> None:
        publish(bundle.folder, backend)
        none = np.empty(0, np.int64)
        fetched = fetch(backend, bundle.name, {"item": none, "user": np.array([-5], np.int64)})
        assert fetched["item"][0].shape == (0, 32)
        assert fetched["user"][1].tolist() == [False]
        assert fetch(backend, bundle.name, {}) == {}

    def test_hot_ids_keep_their_order(self, backend: Backend, bundle: Bundle) -> None:
        publish(bundle.folder, backend)
        for table in bundle.manifest.tables:
            np.testing.assert_array_equal(backend.hot_ids(bundle.name, table.name), bundle.hot[table.name])

    def test_unknown_release_and_table(self, backend: Backend, bundle: Bundle) -> None:
        publish(bundle.folder, backend)
        ids = {"item": np.zeros(1, np.int64)}
        for release in ("demo@2", "demo", "../../etc@1", ""):
            with pytest.raises(UnknownRelease, match="release"):
                fetch(backend, release, ids)
        with pytest.raises(UnknownRelease, match=r"no release 'demo@2' in .*; it has: demo@1"):
            backend.manifest("demo@2")
        with pytest.raises(UnknownTable, match=r"release demo@1 has no table 'author'; it has: item, wide.item"):
            fetch(backend, bundle.name, {"author": np.zeros(1, np.int64)})

    def test_publishing_again_changes_nothing(self, backend: Backend, bundle: Bundle) -> None:
        publish(bundle.folder, backend)
        steps: list[str] = []
        again = publish(bundle.folder, backend, progress=lambda step, done, total: steps.append(step))
        assert again == Published(bundle.manifest, new=False)
        assert steps == []
        assert [stored.state for stored in backend.inventory()] == ["ready"]

    def test_other_content_under_the_same_name_is_refused(
        self, backend: Backend, bundle: Bundle, tmp_path: Path
    ) -> None:
        publish(bundle.folder, backend)
        other = make_bundle(tmp_path / "other", seed=8)
        with pytest.raises(ReleaseConflict, match="has a release demo@1 with other content"):
            publish(other.folder, backend)
        ids = np.arange(100, dtype=np.int64)
        rows, found = fetch(backend, bundle.name, {"item": ids})["item"]
        check_rows(bundle, "item", ids, rows, found)

    def test_of_two_publishers_with_one_name_the_first_to_commit_wins(
        self, backend: Backend, bundle: Bundle, tmp_path: Path
    ) -> None:
        other = make_bundle(tmp_path / "other", seed=8)
        with backend.writer(bundle.manifest) as slow:
            publish(other.folder, backend)
            with pytest.raises(ReleaseConflict, match="with other content"):
                slow.commit()
        assert backend.manifest("demo@1") == other.manifest

    def test_a_release_is_unknown_until_it_commits(self, backend: Backend, bundle: Bundle) -> None:
        table = bundle.manifest.table("item")
        with backend.writer(bundle.manifest) as writer:
            writer.write(table, next(read_chunks(bundle.folder / "tables", table)))
            with pytest.raises(UnknownRelease):
                backend.manifest(bundle.name)
            assert backend.releases() == {}
            (unfinished,) = backend.inventory()
            assert (unfinished.release, unfinished.state, unfinished.publisher) == (bundle.name, "unfinished", True)
            assert unfinished.manifest == bundle.manifest
        publish(bundle.folder, backend)
        assert list(backend.releases()) == [bundle.name]
        assert [stored.state for stored in backend.inventory()] == ["ready"]

    def test_publishing_goes_on_after_the_last_verified_table(self, backend: Backend, bundle: Bundle) -> None:
        steps: list[str] = []

        class Interrupted(Exception):
            pass

        def interrupt(step: str, done: int, total: int) -> None:
            if step == "verified wide.item":
                raise Interrupted

        with pytest.raises(Interrupted):
            publish(bundle.folder, backend, progress=interrupt)
        publish(bundle.folder, backend, progress=lambda step, done, total: steps.append(step))
        assert "writing item" not in steps
        assert "writing wide.item" not in steps
        assert "writing user" in steps
        ids = np.arange(5000, dtype=np.int64)
        rows, found = fetch(backend, bundle.name, {"item": ids})["item"]
        check_rows(bundle, "item", ids, rows, found)

    def test_a_damaged_bundle_is_not_published(self, backend: Backend, bundle: Bundle) -> None:
        path = bundle.folder / "tables" / "user.pages"
        content = bytearray(path.read_bytes())
        content[12345] ^= 1
        path.write_bytes(content)
        with pytest.raises(InvalidRelease, match=r"user.pages does not have the checksum"):
            publish(bundle.folder, backend)
        path.write_bytes(content[:-1])
        with pytest.raises(
            InvalidRelease, match=r"user.pages has \d+ bytes; 1300 rows of 128, and their checks, take 169000"
        ):
            publish(bundle.folder, backend)
        assert backend.releases() == {}

    def test_activate_and_roll_back(self, backend: Backend, tmp_path: Path) -> None:
        for version in ("1", "2", "3"):
            publish(make_bundle(tmp_path / version, int(version), version=version).folder, backend)
        assert backend.active("demo") is None
        with pytest.raises(UnknownRelease, match="no release of model 'demo' was ever active"):
            rollback(backend, "demo")
        assert activate(backend, "demo@1") is None
        assert activate(backend, "demo@2") == "demo@1"
        assert activate(backend, "demo@2") == "demo@2"
        assert activate(backend, "demo@3") == "demo@2"
        assert rollback(backend, "demo") == ("demo@3", "demo@2")
        assert rollback(backend, "demo") == ("demo@2", "demo@1")
        assert backend.active("demo") == "demo@1"
        with pytest.raises(UnknownRelease, match="demo@1 is the first active release of demo"):
            rollback(backend, "demo")
        with pytest.raises(UnknownRelease, match="no release 'demo@4'"):
            activate(backend, "demo@4")
        assert backend.histories() == {"demo": ("demo@1",)}
        states = {state.name: (state.state, state.active) for state in list_releases(backend)}
        assert states == {"demo@1": ("ready", True), "demo@2": ("ready", False), "demo@3": ("ready", False)}

    def test_the_pointer_moves_only_from_where_it_was_expected(
        self, backend: Backend, bundle: Bundle, tmp_path: Path
    ) -> None:
        publish(bundle.folder, backend)
        publish(make_bundle(tmp_path / "2", 2, version="2").folder, backend)
        backend.set_history("demo", (), ("demo@1",))
        backend.set_history("demo", (), ("demo@1",))  # there already: an answer that was lost on its way
        with pytest.raises(ReleaseConflict, match="active release of demo is demo@1, not demo@0"):
            backend.set_history("demo", ("demo@0",), ("demo@2",))
        with pytest.raises(UnknownRelease, match=r"no release 'demo@3' in .*; it has: demo@1, demo@2"):
            backend.set_history("demo", ("demo@1",), ("demo@1", "demo@3"))
        assert backend.history("demo") == ("demo@1",)

    def test_of_many_who_move_the_pointer_one_wins(self, backend: Backend, url: str, tmp_path: Path) -> None:
        tables = (TestTable("item", "fp32", rows=10, dim=1),)
        for number in range(24):
            made = make_bundle(tmp_path / f"{number}", number, version=f"{number}", tables=tables)
            publish(made.folder, backend)

        def move(number: int) -> bool:
            with open_backend(url) as own:
                try:
                    own.set_history("demo", (), (f"demo@{number}",))
                except ReleaseConflict:
                    return False
                return True

        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(move, range(24)))
        assert won.count(True) == 1
        assert backend.active("demo") == f"demo@{won.index(True)}"

    def test_another_process_sees_it(
        self, backend: Backend, bundle: Bundle, url: str, open_other: Callable[[str], Backend]
    ) -> None:
        other = open_other(url)
        publish(bundle.folder, backend)
        activate(backend, bundle.name)
        assert other.active("demo") == bundle.name
        assert other.manifest(bundle.name) == bundle.manifest

    def test_a_lost_page_is_damage_and_not_an_absent_id(self, backend: Backend, bundle: Bundle, url: str) -> None:
        publish(bundle.folder, backend)
        lose_a_page(url, bundle)
        message = r"damaged|has lost page 2 of table 'user'"
        with open_backend(url) as fresh, pytest.raises(StoreUnavailable, match=message):
            fetch(fresh, bundle.name, {"user": np.array([1, 130, -1], np.int64)})


@pytest.fixture
def open_other() -> Iterator[Callable[[str], Backend]]:
    opened: list[Backend] = []

    def open_one(url: str) -> Backend:
        opened.append(open_backend(url))
        return opened[-1]

    yield open_one
    for backend in opened:
        backend.close()


def lose_a_page(url: str, bundle: Bundle) -> None:
    if url.startswith("memmap://"):
        path = Path(url.removeprefix("memmap://")) / "releases" / bundle.name / "tables" / "user.pages"
        path.write_bytes(path.read_bytes()[:-1])
        return
    from embedding_store.redis_backend import RedisBackend
    from embedding_store.redis_keys import page_key
    from embedding_store.redis_url import parse_redis_url

    with RedisBackend(parse_redis_url(url)) as redis:
        assert redis.control.delete(page_key(redis.prefix, namespace(bundle.manifest), "user", 2)) == 1
