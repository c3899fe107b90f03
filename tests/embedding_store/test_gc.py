"""gc: what it keeps and why, that nothing is left of the rest, and that nobody ever reads a wrong row."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from embedding_store.backend import Backend, Stored, namespace
from embedding_store.batch import batch_of
from embedding_store.byte_sizes import format_size
from embedding_store.codec import decode
from embedding_store.errors import ReleaseConflict, UnknownRelease
from embedding_store.gc import collect, plan
from embedding_store.lookup import FOUND
from embedding_store.memmap_pins import Pin
from embedding_store.open import open_backend
from embedding_store.publish import publish, publish_and_activate
from embedding_store.redis_backend import RedisBackend
from embedding_store.releases import activate, list_releases, rollback
from tests.embedding_store.bundles import Bundle, TestTable, check_release, make_bundle
from tests.embedding_store.conftest import StoreUrl
from torchrank.cli import cli

KINDS = ("memmap", "redis", "redis+cluster")
TABLES = (
    TestTable("item", "fp16", rows=9000, dim=16, hot=50),
    TestTable("raw", "fp32", rows=700, dim=8, hot=20, sparse=True),
)
Make = Callable[..., Bundle]


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, url_of: StoreUrl) -> str:
    return url_of(request.param)


@pytest.fixture
def backend(url: str) -> Iterator[Backend]:
    with open_backend(url) as backend:
        yield backend


@pytest.fixture
def made(backend: Backend, tmp_path: Path) -> Make:
    """made("3"): version 3 of a bundle, published; another seed makes other content."""
    numbers = itertools.count()

    def make(version: str, *, seed: int | None = None, active: bool = False) -> Bundle:
        bundle = make_bundle(
            tmp_path / f"{next(numbers)}", int(version) if seed is None else seed, version=version, tables=TABLES
        )
        (publish_and_activate if active else publish)(bundle.folder, backend)
        return bundle

    return make


def removed(backend: Backend, **options: float) -> list[str]:
    decisions = collect(backend, **options)  # type: ignore[arg-type]
    return [decision.release for decision in decisions if decision.removed]


def reasons(backend: Backend, **options: float) -> dict[str, str]:
    """Why each is kept."""
    decisions = [decision for _, decision in plan(backend, **options)]  # type: ignore[arg-type]
    return {decision.release: decision.reason for decision in decisions if not decision.removed}


def take_out(backend: Backend, release: str) -> Stored:
    (stored,) = [stored for stored in backend.inventory() if stored.release == release]
    backend.take_out(stored)
    return stored


def leftovers(backend: Backend, release: Bundle) -> list[str]:
    """Names of what the store still has of this content, beside the note that it was removed."""
    content = namespace(release.manifest)
    if isinstance(backend, RedisBackend):
        control: Any = backend.control
        clients = [control]
        if backend.cluster:
            clients = [control.get_redis_connection(node) for node in control.get_primaries()]
        keys = [key.decode() for client in clients for key in client.scan_iter(f"*{backend.prefix}*", count=10_000)]
        return [key for key in keys if content in key]
    folder = Path(backend.address.removeprefix("memmap://"))
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    return [str(path) for path in paths if release.name in str(path) and path.parts[0] != "removed"]


class TestWhatStays:
    def test_active_the_ones_before_and_the_rest(
        self, backend: Backend, made: Make, url: str, opened: Callable[[str], Backend]
    ) -> None:
        bundles = [made(version, active=True) for version in "1234"] + [made("5")]
        assert reasons(backend, keep=1, grace=0) == {"demo@4": "active", "demo@3": "what rollback returns to"}
        assert reasons(backend, keep=2, grace=0) == {
            "demo@4": "active",
            "demo@3": "what rollback returns to",
            "demo@2": "what rollback returns to",
        }
        assert list(backend.releases()) == [bundle.name for bundle in bundles], "plan removes nothing"
        assert removed(backend, keep=2, grace=0) == ["demo@1", "demo@5"]
        assert removed(backend, keep=0, grace=0) == ["demo@2", "demo@3"]
        assert list(backend.releases()) == ["demo@4"]
        check_release(backend, bundles[3])
        for bundle in (*bundles[:3], bundles[4]):
            assert leftovers(backend, bundle) == []
            with pytest.raises(UnknownRelease, match=f"no release '{bundle.name}' in .*; it has: demo@4"):
                opened(url).manifest(bundle.name)
        assert removed(backend, grace=0) == []

    def test_every_model_has_its_own(self, backend: Backend, tmp_path: Path) -> None:
        for model in ("one", "other"):
            for version in ("1", "2", "3"):
                bundle = make_bundle(tmp_path / model / version, 1, model=model, version=version, tables=TABLES)
                publish_and_activate(bundle.folder, backend)
        assert removed(backend, grace=0) == ["one@1", "other@1"]

    def test_what_was_published_or_active_within_the_grace_time(self, backend: Backend, made: Make) -> None:
        made("1", active=True)
        made("2", active=True)
        time.sleep(1.2)
        made("3", active=True)  # demo@2 leaves, and demo@1 is not what rollback returns to
        made("4")
        kept = reasons(backend, keep=0, grace=1)
        assert list(kept) == ["demo@2", "demo@3", "demo@4"]
        assert kept["demo@2"].endswith(" s ago, within the grace time of 1 s")
        assert removed(backend, keep=0, grace=1) == ["demo@1"]

    @pytest.mark.parametrize("options", [{"keep": -1}, {"grace": -1}])
    def test_negative_options(self, backend: Backend, made: Make, options: dict[str, float]) -> None:
        made("1")
        with pytest.raises(ValueError, match="both must be 0 or more"):
            plan(backend, **options)  # type: ignore[arg-type]


class TestPins:
    def test_a_release_that_is_pinned_stays_until_the_pin_ends(
        self, backend: Backend, made: Make, url: str, opened: Callable[[str], Backend]
    ) -> None:
        for version in "123":
            made(version)
        sidecar = opened(url)
        assert sidecar.pin("host-1", ["demo@1", "demo@2", "demo@9"], 60) == {"demo@1", "demo@2"}
        assert opened(url).pin("host-2", ["demo@2"], 60) == {"demo@2"}
        assert backend.pins() == {"demo@1": ["host-1"], "demo@2": ["host-1", "host-2"], "demo@9": ["host-1"]}
        assert [state.pinned_by for state in list_releases(backend)] == [("host-1",), ("host-1", "host-2"), ()]
        assert reasons(backend, grace=0) == {"demo@1": "pinned by host-1", "demo@2": "pinned by host-1, host-2"}
        assert removed(backend, grace=0) == ["demo@3"]
        assert sidecar.pin("host-1", ["demo@2"], 60) == {"demo@2"}
        assert removed(backend, grace=0) == ["demo@1"]
        assert sidecar.pin("host-1", [], 60) == frozenset()
        assert removed(backend, grace=0) == []
        assert opened(url).pin("host-1", ["demo@1"], 60) == frozenset(), "that one has gone"

    def test_one_that_came_into_use_since_it_was_looked_at_stays(
        self, backend: Backend, made: Make, url: str, opened: Callable[[str], Backend]
    ) -> None:
        for version in "12":
            made(version)
        pinned, activated = backend.inventory()
        opened(url).pin("host-1", ["demo@1"], 60)
        activate(backend, "demo@2")
        with pytest.raises(ReleaseConflict, match="demo@1 has been pinned by host-1"):
            backend.take_out(pinned)
        with pytest.raises(ReleaseConflict, match="demo@2 has become active"):
            backend.take_out(activated)
        assert list(backend.releases()) == ["demo@1", "demo@2"]

    def test_an_owner_is_a_name(self, backend: Backend, made: Make) -> None:
        made("1")
        with pytest.raises(ValueError, match=r"owner '\.\./x': a name has"):
            backend.pin("../x", ["demo@1"], 60)

    def test_pins_in_redis_run_out(self, url_of: StoreUrl) -> None:
        with open_backend(url_of("redis")) as backend:
            backend.pin("host-1", ["demo@1"], 0.3)
            assert backend.pins() == {"demo@1": ["host-1"]}
            time.sleep(0.4)
            assert backend.pins() == {}

    def test_pins_of_files_end_with_their_process_or_their_time(self, url_of: StoreUrl, tmp_path: Path) -> None:
        """Of an owner on another host, whose lock may not be seen here, only the time counts."""
        with open_backend(url_of("memmap")) as backend:
            backend.create()
            with open_backend(url_of("memmap")) as owner:
                owner.pin("host-1", ["demo@1"], 0)
                assert backend.pins() == {"demo@1": ["host-1"]}, "as long as it has the lock"
            assert backend.pins() == {}
            for until, pins in ((time.time() + 60, {"demo@1": ["far"]}), (time.time() - 1, {})):
                pin = Pin(["demo@1"], until, "another-host")
                (tmp_path / "store" / "pins" / "far.json").write_bytes(msgspec.json.encode(pin))
                assert backend.pins() == pins


class TestUnfinished:
    def start(self, backend: Backend, tmp_path: Path) -> Bundle:
        """A publication that was interrupted."""
        bundle = make_bundle(tmp_path / "begun", 4, version="4", tables=TABLES)

        class Interrupted(Exception):
            pass

        def interrupt(step: str, done: int, total: int) -> None:
            if step == "verified item":
                raise Interrupted

        with pytest.raises(Interrupted):
            publish(bundle.folder, backend, progress=interrupt)
        return bundle

    def test_one_that_was_given_up_goes(self, backend: Backend, made: Make, tmp_path: Path) -> None:
        active = made("1", active=True)
        begun = self.start(backend, tmp_path)
        assert reasons(backend, grace=60)["demo@4"].startswith("worked on 0 s ago, within the grace time")
        assert removed(backend, grace=0) == ["demo@4"]
        assert leftovers(backend, begun) == []
        check_release(backend, active)
        publish(begun.folder, backend)
        check_release(backend, begun)

    def test_one_that_is_under_way_stays(self, backend: Backend, tmp_path: Path) -> None:
        bundle = make_bundle(tmp_path / "begun", 4, version="4", tables=TABLES)
        with backend.writer(bundle.manifest):
            assert reasons(backend, grace=0) == {"demo@4": "is being published"}
            with pytest.raises(ReleaseConflict, match="demo@4 is being published"):
                take_out(backend, "demo@4")

    def test_a_publisher_whose_pages_were_removed_is_told(self, url_of: StoreUrl, tmp_path: Path) -> None:
        """It slept longer than its lease and the grace time. (Of files it has a lock, which no time ends.)"""
        bundle = make_bundle(tmp_path / "begun", 4, version="4", tables=TABLES)
        with open_backend(url_of("redis")) as backend, backend.writer(bundle.manifest) as writer:
            assert isinstance(backend, RedisBackend)
            backend.control.delete(backend.key(namespace(bundle.manifest), "lease"))
            assert removed(backend, grace=0) == ["demo@4"]
            with pytest.raises(ReleaseConflict, match="was finished or removed by others meanwhile; publish it again"):
                writer.commit()
            assert backend.inventory() == []


class TestGone:
    def test_rolling_back_to_one_that_is_gone_says_so(self, backend: Backend, made: Make) -> None:
        for version in "123":
            made(version, active=True)
        assert removed(backend, grace=0) == ["demo@1"]
        assert rollback(backend, "demo") == ("demo@3", "demo@2")
        message = r"demo@1, which was active before demo@2, is no longer in .*: gc has removed it; publish it again"
        with pytest.raises(UnknownRelease, match=message):
            rollback(backend, "demo")
        assert backend.active("demo") == "demo@2"

    def test_it_can_be_published_again_but_not_with_other_content(self, backend: Backend, made: Make) -> None:
        first = made("1")
        assert removed(backend, grace=0) == ["demo@1"]
        with pytest.raises(ReleaseConflict, match="had, until gc removed it, a release demo@1 with other content"):
            made("1", seed=77)
        again = made("1")
        assert again.manifest == first.manifest
        check_release(backend, again)
        assert removed(backend, grace=0) == ["demo@1"]
        made("1")
        check_release(backend, again)

    def test_a_reader_from_before_reads_what_is_published_again(
        self, backend: Backend, made: Make, url: str, opened: Callable[[str], Backend]
    ) -> None:
        bundle = made("1")
        reader = opened(url)
        check_release(reader, bundle)
        assert removed(backend, grace=0) == ["demo@1"]
        made("1")
        reader.releases()  # as a sidecar does every few seconds
        check_release(reader, bundle)

    def test_all_that_goes_is_invisible_before_the_first_is_erased(self, backend: Backend, made: Make) -> None:
        """Erasing takes long; meanwhile nobody may activate what is to be erased next."""
        made("1")
        made("2")
        seen = []
        collect(backend, grace=0, erased=lambda *_: seen.append(list(backend.releases())))
        assert len(seen) > 1
        assert not any(seen)

    def test_several_at_once(self, url: str, made: Make, opened: Callable[[str], Backend]) -> None:
        bundles = [made(version) for version in "123"]
        with ThreadPoolExecutor(3) as threads:
            for found in [threads.submit(collect, opened(url), grace=0) for _ in range(3)]:
                found.result()
        for bundle in bundles:
            assert leftovers(opened(url), bundle) == []

    def test_publishing_again_while_the_old_pages_are_being_erased(self, backend: Backend, made: Make) -> None:
        bundle = made("1")
        erasing = backend.erase(take_out(backend, "demo@1"))
        next(erasing)
        made("1")
        for _ in erasing:
            pass
        check_release(backend, bundle)
        assert [stored.state for stored in backend.inventory()] == ["ready"]

    def test_whoever_reads_meanwhile_gets_right_rows_or_none(
        self, backend: Backend, made: Make, url: str, opened: Callable[[str], Backend]
    ) -> None:
        bundle = made("1")
        reader, ids = opened(url), np.arange(9000, dtype=np.int64)
        manifest = reader.manifest("demo@1")
        stopped, wrong, reads = threading.Event(), [], [0]

        def read() -> None:
            while not stopped.is_set():
                fetched = reader.fetch("demo@1", batch_of(manifest, {"item": ids}))
                found = fetched.status == FOUND
                rows = decode("fp16", fetched.rows.reshape(len(ids), -1)[found])
                wrong.append(int((rows != bundle.values["item"][:-1][found]).sum()))
                reads[0] += 1

        thread = threading.Thread(target=read)
        thread.start()
        deadline = time.monotonic() + 30
        while reads[0] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert removed(backend, grace=0) == ["demo@1"]
        after = reads[0]
        while reads[0] < after + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        stopped.set()
        thread.join()
        assert reads[0] >= after + 3
        assert not any(wrong)


class TestCommand:
    def run(self, url: str, *options: str) -> str:
        result = CliRunner().invoke(cli, ["gc", "--store", url, *options])
        assert result.exit_code == 0, result.output
        return result.output

    def test_as_typed(self, backend: Backend, made: Make, url: str) -> None:
        for version in "123":
            size = sum(table.bytes + table.ids_bytes for table in made(version, active=True).manifest.tables)
        assert "removed 0 of 3, 0B" in self.run(url)
        output = self.run(url, "--grace", "0s", "--dry-run")
        assert f"would remove 1 of 3, {format_size(size)}" in output
        assert "what rollback returns to" in output
        answer = json.loads(self.run(url, "--grace", "0s", "--keep", "0", "--json").splitlines()[-1])
        assert answer["dry_run"] is False
        assert [(one["release"], one["removed"], one["bytes"]) for one in answer["releases"]] == [
            ("demo@1", True, size), ("demo@2", True, size), ("demo@3", False, size),
        ]  # fmt: skip
        assert "demo@1" not in self.run(url)

    def test_nothing_there(self, url_of: StoreUrl) -> None:
        assert "has no releases" in self.run(url_of("redis"))

    @pytest.mark.parametrize("grace", ["soon", "-1h", "5 years"])
    def test_a_time_that_is_none(self, url_of: StoreUrl, grace: str) -> None:
        result = CliRunner().invoke(cli, ["gc", "--store", url_of("redis"), f"--grace={grace}"])
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: duration {grace!r}: expected a number and a unit, as in 90s, 30m")
