"""Publishing that is interrupted, limited, lied to or overtaken; the ordinary case is in test_backend_contract.py."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedding_store import bundle as bundle_files
from embedding_store import publish as publishing
from embedding_store import redis_writer
from embedding_store.backend import Backend, ReleaseWriter, namespace
from embedding_store.bundle import read_chunks
from embedding_store.errors import InvalidRelease, ReleaseConflict, StoreUnavailable
from embedding_store.gc import collect
from embedding_store.open import open_backend
from embedding_store.publish import Published, publish, publish_and_activate
from embedding_store.redis_backend import RedisBackend
from embedding_store.redis_keys import control_key, page_key
from embedding_store.redis_writer import RedisWriter
from embedding_store.releases import activate
from tests.embedding_store.bundles import Bundle, TestTable, check_release, make_bundle
from tests.embedding_store.conftest import StoreUrl
from tests.redis_server import RedisServer

KINDS = ("memmap", "redis", "redis+cluster")
TABLES = (
    TestTable("first", "fp16", rows=3000, dim=16, hot=10),
    TestTable("item", "fp16", rows=9000, dim=16, hot=500),
    TestTable("raw", "fp32", rows=4000, dim=8, hot=20, sparse=True),
)


class Interrupted(Exception):
    pass


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, url_of: StoreUrl) -> Iterator[Backend]:
    with open_backend(url_of(request.param)) as backend:
        yield backend


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Of tables with some twenty chunks, each of which is marked when it was verified."""
    monkeypatch.setattr(bundle_files, "_CHUNK_BYTES", 16_384)
    monkeypatch.setattr(publishing, "_MARKED_BYTES", 1)
    return make_bundle(tmp_path / "bundle", seed=7, tables=TABLES)


def interrupt(bundle: Bundle, backend: Backend, step: str, count: int) -> None:
    """Publishes, until `step` has come `count` times."""
    seen = [0]

    def progress(name: str, done: int, total: int) -> None:
        seen[0] += name == step
        if seen[0] == count:
            raise Interrupted

    with pytest.raises(Interrupted):
        publish(bundle.folder, backend, progress=progress)


def written(bundle: Bundle, backend: Backend) -> ReleaseWriter:
    """All but the commit."""
    writer = backend.writer(bundle.manifest)
    for table in bundle.manifest.tables:
        for chunk in read_chunks(bundle.folder / "tables", table):
            writer.write(table, chunk)
        writer.write_hot(table, bundle.hot[table.name].tobytes())
    return writer


def steps(bundle: Bundle, backend: Backend) -> list[str]:
    """What a whole publication does."""
    names: list[str] = []
    publish(bundle.folder, backend, progress=lambda step, done, total: names.append(step))
    return names


@pytest.mark.parametrize("table", ["item", "raw"])
def test_an_interrupted_table_goes_on_behind_its_last_verified_chunk(
    backend: Backend, bundle: Bundle, table: str
) -> None:
    interrupt(bundle, backend, f"verifying {table}", 5)
    rest = steps(bundle, backend)
    assert "writing first" not in rest
    assert rest.count(f"skipping {table}") == 4, "the fifth was verified, but not yet marked"
    assert rest.count(f"writing {table}") == rest.count(f"verifying {table}") > 4
    check_release(backend, bundle)


def test_what_was_copied_from_a_damaged_bundle_is_copied_again(backend: Backend, bundle: Bundle) -> None:
    """The damage is in a chunk that was written and marked; then the bundle is repaired."""
    path = bundle.folder / "tables" / "item.pages"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    interrupt(bundle, backend, "verifying item", 5)
    path.write_bytes(whole)
    assert steps(bundle, backend).count("writing item") == -(-len(whole) // (16_384 // 8160 * 8160))
    check_release(backend, bundle)


def test_a_rate_limit_holds(backend: Backend, tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "small", 1, tables=(TestTable("item", "fp32", rows=1000, dim=50),))
    began = time.monotonic()
    publish(made.folder, backend, bytes_per_second=400_000)  # the last piece is not waited for
    assert time.monotonic() - began > 0.4
    check_release(backend, made)


def test_a_rate_limit_is_more_than_nothing(backend: Backend, bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="rate limit 0: accepted are more than 0 bytes a second"):
        publish(bundle.folder, backend, bytes_per_second=0)


def test_a_pointer_that_somebody_else_moved_meanwhile_stays_there(
    backend: Backend, bundle: Bundle, tmp_path: Path
) -> None:
    for version in ("0", "2"):
        publish(make_bundle(tmp_path / version, 3, version=version).folder, backend)
    activate(backend, "demo@0")

    def overtake(step: str, done: int, total: int) -> None:
        if step == "writing raw":
            activate(backend, "demo@2")

    message = "active release of demo is demo@2, not demo@0: .* meanwhile; demo@1 is published, but not active"
    with pytest.raises(ReleaseConflict, match=message):
        publish_and_activate(bundle.folder, backend, progress=overtake)
    assert backend.active("demo") == "demo@2"
    assert publish_and_activate(bundle.folder, backend) == (Published(bundle.manifest, new=False), "demo@2")
    assert publish_and_activate(bundle.folder, backend) == (Published(bundle.manifest, new=False), "demo@1")
    assert backend.history("demo") == ("demo@0", "demo@2", "demo@1")
    check_release(backend, bundle)


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_processes_that_publish_and_activate_one_wins(kind: str, url_of: StoreUrl, tmp_path: Path) -> None:
    """Both have begun, and so have seen the pointer, before one of them can be ready."""
    url = url_of(kind)
    made = [make_bundle(tmp_path / version, 3, version=version, tables=TABLES) for version in ("0", "1", "2")]
    with open_backend(url) as backend:
        publish_and_activate(made[0].folder, backend)
        command = [sys.executable, "-m", "torchrank.cli", "publish", "--activate", "--store", url]
        command += ["--rate-limit", "200kB"]
        racers = [
            subprocess.Popen([*command, str(one.folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for one in made[1:]
        ]
        both = {"demo@0", "demo@1", "demo@2"}
        deadline = time.monotonic() + 60
        while {stored.release for stored in backend.inventory()} != both and time.monotonic() < deadline:
            assert backend.active("demo") == "demo@0", "the first was ready before the second had begun"
            time.sleep(0.02)
        output = [racer.communicate(timeout=120) for racer in racers]
        winner = [racer.returncode for racer in racers].index(0)
        name, other = made[1 + winner].name, made[2 - winner].name
        assert racers[1 - winner].returncode == 1
        assert output[winner][0].endswith(f"{name} is active; before: demo@0\n")
        assert f"the active release of demo is {name}, not demo@0" in output[1 - winner][1]
        assert output[1 - winner][1].endswith(f"; {other} is published, but not active\n")
        assert backend.history("demo") == ("demo@0", name)
        for one in made:
            check_release(backend, one)


def test_a_second_publisher_of_the_same_bundle_is_told(backend: Backend, bundle: Bundle) -> None:
    with backend.writer(bundle.manifest), pytest.raises(ReleaseConflict, match=r"publisher.* is writing demo@1"):
        publish(bundle.folder, backend)
    publish(bundle.folder, backend)


class TestRedis:
    """What cannot happen to files."""

    @pytest.fixture
    def backend(self, redis_server: RedisServer) -> Iterator[Backend]:
        with open_backend(redis_server.url) as backend:
            yield backend

    def page(self, bundle: Bundle, table: str, number: int) -> str:
        return page_key("torchrank", namespace(bundle.manifest), table, number)

    def test_a_page_that_is_stored_otherwise_than_written(
        self, backend: Backend, bundle: Bundle, redis_server: RedisServer
    ) -> None:
        def damage(step: str, done: int, total: int) -> None:
            if step == "writing item":
                redis_server.client().setrange(self.page(bundle, "item", 1), 40, b"?")

        with pytest.raises(InvalidRelease, match="gives back page 1 of table 'item' not as it was written"):
            publish(bundle.folder, backend, progress=damage)
        assert backend.releases() == {}
        publish(bundle.folder, backend)
        check_release(backend, bundle)

    def test_pages_that_vanish_before_all_is_there(
        self, backend: Backend, bundle: Bundle, redis_server: RedisServer
    ) -> None:
        def lose(step: str, done: int, total: int) -> None:
            if step == "writing raw":
                redis_server.client().delete(self.page(bundle, "item", 1), self.page(bundle, "item", 3))

        with pytest.raises(StoreUnavailable, match=r"has lost 2 of 38 pages of table 'item' .* publish it again"):
            publish(bundle.folder, backend, progress=lose)
        assert backend.releases() == {}
        again = steps(bundle, backend)
        assert "writing first" not in again
        assert "writing item" in again
        check_release(backend, bundle)

    def test_a_publisher_that_comes_too_late_leaves_no_claim_on_the_pages(
        self, backend: Backend, bundle: Bundle
    ) -> None:
        """It looked before the other had finished, and begins after. Its record would give live pages to gc."""
        assert isinstance(backend, RedisBackend)
        publish_and_activate(bundle.folder, backend)
        with pytest.raises(ReleaseConflict, match="another publisher has finished demo@1 meanwhile"):
            RedisWriter(backend, bundle.manifest)
        assert [decision.reason for decision in collect(backend, keep=0, grace=0)] == ["active"]
        check_release(backend, bundle)

    @pytest.mark.parametrize("again", ["commit", "gc"])
    def test_a_record_of_a_publication_that_is_complete(self, backend: Backend, bundle: Bundle, again: str) -> None:
        """As a fail-over in the middle may leave it. Whoever meets it removes it, and no page."""
        assert isinstance(backend, RedisBackend)
        writer = written(bundle, backend)
        record = backend.control.hget(backend.key("writing"), namespace(bundle.manifest))
        assert isinstance(record, bytes)
        writer.commit()
        activate(backend, "demo@1")
        backend.control.hset(backend.key("writing"), namespace(bundle.manifest), record)
        if again == "commit":
            writer.commit()
        else:
            (_, unfinished) = collect(backend, keep=0, grace=0)
            assert unfinished.reason.endswith("demo@1 is complete meanwhile")
        assert [stored.state for stored in backend.inventory()] == ["ready"]
        check_release(backend, bundle)

    def test_the_lease_of_a_publisher_elsewhere_is_waited_for(
        self, backend: Backend, bundle: Bundle, redis_server: RedisServer
    ) -> None:
        lease = control_key("torchrank", namespace(bundle.manifest), "lease")
        redis_server.client().set(lease, "elsewhere:77:0011aabb", px=700)
        message = r"another publisher, process 77 on elsewhere, .* \(if it is dead: its lease ends in [01] s\)"
        with pytest.raises(ReleaseConflict, match=message):
            publish(bundle.folder, backend)
        time.sleep(0.8)
        publish(bundle.folder, backend)
        check_release(backend, bundle)

    def test_a_publisher_that_was_paused_too_long_is_told_who_took_over(
        self,
        backend: Backend,
        bundle: Bundle,
        opened: Callable[[str], Backend],
        redis_server: RedisServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(redis_writer, "_LEASE_MS", 200)
        monkeypatch.setattr(redis_writer, "_RENEWED_AFTER", 0)
        with backend.writer(bundle.manifest) as paused:
            paused.renew()
            time.sleep(0.3)
            paused.renew()  # nobody came: it goes on
            time.sleep(0.3)
            with opened(redis_server.url).writer(bundle.manifest):
                with pytest.raises(ReleaseConflict, match=r"was paused, and process \d+ on .* has taken it over"):
                    paused.renew()
                with pytest.raises(ReleaseConflict, match=r"was paused, and process \d+ on .* has taken it over"):
                    paused.commit()
        assert backend.releases() == {}
        publish(bundle.folder, backend)
        check_release(backend, bundle)
