"""Pages are lost or changed that look-ups are running on, and mended by commands: nothing wrong was served unflagged,
all is whole again, and nobody was restarted."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from embedding_store.degrade import DegradePolicy
from embedding_store.lookup import UNAVAILABLE, LookupReply
from embedding_store.open import open_store
from embedding_store.publish import publish
from embedding_store.store import EmbeddingStore
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.embedding_store.corruptions import ANOTHER, CORRUPTIONS
from tests.embedding_store.corruptions import TABLES as CHANGED
from tests.embedding_store.damage import Files, Keys, damager
from tests.faults.traffic import Traffic
from torchrank.cli import cli

TABLES = (
    TestTable("item", "fp16", rows=4000, dim=16, hot=50, default=True),
    TestTable("user", "int8", rows=3000, dim=24, hot=50, default=True),
)
DAMAGES: dict[str, Callable[[Keys | Files], None]] = {
    "lost": lambda it: it.lose("item", 2),
    "cut": lambda it: it.cut("user", 1),
}
VERIFY = ("verify", "--mend")


class OneByOne:
    """Look-ups that can be held off for a moment: a file that is cut off while it is read kills the reader."""

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store
        self.held = threading.Lock()

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        with self.held:
            return self._store.lookup(release, ids, timeout=timeout)


@pytest.fixture(params=["memmap", "redis", "redis+cluster"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memmap":
        return f"memmap://{tmp_path / 'store'}"
    if request.param == "redis":
        server_url: str = request.getfixturevalue("redis_server").url
        return server_url
    return f"{request.getfixturevalue('redis_cluster').url}?prefix={secrets.token_hex(8)}"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", 5, tables=TABLES)


def repaired(command: tuple[str, ...], bundle: Bundle, url: str) -> None:
    result = CliRunner().invoke(cli, [*command, str(bundle.folder), "--store", url])
    assert result.exit_code == 0, result.output
    assert "demo@1: compared with the bundle, mended and whole in" in result.output


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", [("publish",), VERIFY], ids=["publish", "verify"])
def test_pages_are_lost_and_mended(url: str, damage: str, command: tuple[str, ...], bundle: Bundle) -> None:
    policy = DegradePolicy(("cache", "default"))
    with open_store(url, cache_bytes=25_000, degrade=policy) as store:  # of a tenth of the rows
        publish(bundle.folder, store.backend)
        lookups = OneByOne(store)
        with Traffic(lookups, bundle).running() as traffic:
            with lookups.held:
                DAMAGES[damage](damager(store.backend, bundle.name))
            traffic.wait_until_degraded()
            repaired(command, bundle, url)
            traffic.wait_until_whole()
    assert traffic.flagged[UNAVAILABLE] > 0
    assert not traffic.errors


@pytest.mark.parametrize("seed", [0, 2])  # with 1 a row of the other table passes by chance, as 1 of 65,536
def test_bytes_are_changed_and_mended(url: str, seed: int, tmp_path: Path) -> None:
    """Garbage, zeros, flipped bits, pages in one another's places and of another table, while rows are read: of dense
    ids and of raw ones. What a look-up has not flagged is the release's, before, meanwhile and afterwards."""
    bundle = make_bundle(tmp_path / "changed", 6, tables=CHANGED)
    rng = np.random.default_rng(seed)
    with open_store(url, cache_bytes=25_000, degrade=DegradePolicy(("cache", "default"))) as store:
        publish(bundle.folder, store.backend)
        with Traffic(store, bundle).running() as traffic:
            for name in rng.permutation(list(CORRUPTIONS)).tolist():
                it = damager(store.backend, bundle.name)
                for table in ANOTHER:
                    CORRUPTIONS[name](it, table, rng)
                traffic.wait_until_degraded()
                repaired(VERIFY, bundle, url)
                traffic.wait_until_whole()
    assert traffic.flagged[UNAVAILABLE] > 0
    assert not traffic.errors
