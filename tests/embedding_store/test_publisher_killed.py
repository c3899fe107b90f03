"""kill -9 of a real publisher within every step of write, verify, commit, activate and gc.

What is served stays whole, no half release is ever visible, and the next run completes what this one began.
"""

from __future__ import annotations

import itertools
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_store.backend import Backend
from embedding_store.open import open_backend
from embedding_store.publish import publish, publish_and_activate
from embedding_store.redis_backend import RedisBackend
from tests.embedding_store.bundles import Bundle, TestTable, check_release, make_bundle
from tests.embedding_store.conftest import StoreUrl
from tests.embedding_store.publisher_to_kill import work

TABLES = (
    TestTable("item", "fp16", rows=700, dim=16, hot=50),
    TestTable("raw", "fp32", rows=50, dim=8, hot=20, sparse=True),
)


class Publishers:
    def __init__(self, bundle: Path, folder: Path, what: str = "publish") -> None:
        command = [sys.executable, "-m", "tests.embedding_store.publisher_to_kill", str(bundle), str(folder), what]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, url: str, last_step: int) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{url} {last_step}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture
def bundles(tmp_path: Path) -> list[Bundle]:
    """An old one, the one that is active, and the one to publish."""
    return [make_bundle(tmp_path / f"{n}", n, version=f"{n}", tables=TABLES) for n in range(3)]


@pytest.fixture
def publishers(bundles: list[Bundle], tmp_path: Path) -> Iterator[Publishers]:
    started = Publishers(bundles[-1].folder, tmp_path / "warm")
    yield started
    started.process.communicate(timeout=60)


def another_store(kind: str, url: str, number: int) -> str:
    return f"{url}-{number}" if kind == "memmap" else f"{url.partition('?')[0]}?prefix={secrets.token_hex(8)}"


def check_whole(backend: Backend, bundles: list[Bundle]) -> str:
    """Returns the active release, which must be there, as every visible one must be with all rows."""
    visible = backend.releases()
    for bundle in bundles:
        if bundle.name in visible:
            check_release(backend, bundle)
    active = backend.active("demo")
    assert active in visible
    return active


def check_nothing_left(backend: Backend, url: str) -> None:
    """Of anything but the one release: no files, no keys (of the kind that a lost page or lease would be)."""
    assert [stored.state for stored in backend.inventory()] == ["ready"]
    if not isinstance(backend, RedisBackend):
        store = Path(url.removeprefix("memmap://"))
        left = [path.name for kind in ("writing", "removing", "releases") for path in (store / kind).glob("*")]
        assert left == ["demo@2"]
        return
    for key in ("writing", "removing"):
        assert backend.control.exists(backend.key(key)) == 0
    if not backend.cluster:
        (manifest,) = backend.releases().values()
        pages = sum(table.pages + bool(table.hot_ids) for table in manifest.tables)
        names = {key.decode() for key in backend.control.scan_iter(f"*{backend.prefix}*", count=10_000)}
        control = {backend.key(name) for name in ("releases", "active", "since", "removed")}
        assert len(names - control) == pages


@pytest.mark.parametrize(("kind", "stride"), [("memmap", 1), ("redis+unix", 1), ("redis+cluster", 3)])
def test_killed_within_every_step(
    kind: str, stride: int, url_of: StoreUrl, bundles: list[Bundle], publishers: Publishers
) -> None:
    outcomes = set()
    for step in itertools.count(1, stride):
        url = another_store(kind, url_of(kind), step)
        with open_backend(url) as backend:
            publish(bundles[0].folder, backend)
            publish_and_activate(bundles[1].folder, backend)
        code = publishers.run(url, step)
        with open_backend(url) as backend:
            active = check_whole(backend, bundles)
            outcomes.add((active, len(backend.inventory())))
            if code == 0:
                break
            assert code == -signal.SIGKILL
            work(url, bundles[-1].folder)
            assert check_whole(backend, bundles) == "demo@2", f"after a kill within step {step}"
            assert list(backend.releases()) == ["demo@2"]
            check_nothing_left(backend, url)
    assert step > 25, "it has more steps than that"
    assert {active for active, _ in outcomes} == {"demo@1", "demo@2"}, "killed before the pointer moved, and after it"
