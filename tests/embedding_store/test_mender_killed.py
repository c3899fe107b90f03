"""kill -9 within every step of mending: what is found is right at every moment, and the next run completes it."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding_store.backend import Backend
from embedding_store.batch import batch_of
from embedding_store.lookup import ABSENT, FOUND
from embedding_store.mend import check, mend
from embedding_store.open import open_backend
from embedding_store.publish import publish
from tests.embedding_store.bundles import Bundle, TestTable, check_release, check_rows, make_bundle
from tests.embedding_store.conftest import StoreUrl
from tests.embedding_store.damage import damager
from tests.embedding_store.test_publisher_killed import Publishers, another_store

TABLES = (
    TestTable("item", "fp16", rows=900, dim=16, hot=50),
    TestTable("user", "fp32", rows=300, dim=8, hot=20),
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", 3, tables=TABLES)


@pytest.fixture
def menders(bundle: Bundle, tmp_path: Path) -> Iterator[Publishers]:
    started = Publishers(bundle.folder, tmp_path / "warm", "mend")
    yield started
    started.process.communicate(timeout=60)


def check_what_is_found(backend: Backend, bundle: Bundle) -> None:
    """Other rows are unavailable; none is absent."""
    for table in bundle.manifest.tables:
        ids = np.arange(table.rows, dtype=np.int64)
        fetched = backend.fetch(bundle.name, batch_of(bundle.manifest, {table.name: ids}))
        assert (fetched.status != ABSENT).all()
        found = fetched.status == FOUND
        rows = fetched.rows.reshape(-1, table.row_bytes)
        check_rows(bundle, table.name, ids[found], rows[found], found[found])


@pytest.mark.parametrize(("kind", "stride"), [("memmap", 1), ("redis+unix", 1), ("redis+cluster", 3)])
def test_killed_within_every_step(
    kind: str, stride: int, url_of: StoreUrl, bundle: Bundle, menders: Publishers
) -> None:
    left = set()
    for step in itertools.count(1, stride):
        url = another_store(kind, url_of(kind), step)
        with open_backend(url) as backend:
            publish(bundle.folder, backend)
            check_release(backend, bundle)
            it = damager(backend, bundle.name)
            it.cut("item", 1)
            it.lose("user", 0)
            it.lose_hot("user")
            code = menders.run(url, step)
            check_what_is_found(backend, bundle)
            damages = check(bundle.folder, backend)
            left.add(len(damages))
            if code == 0:
                break
            assert code == -signal.SIGKILL
            assert mend(bundle.folder, backend) == damages
            assert check(bundle.folder, backend) == ()
            check_release(backend, bundle)
    assert step > 8, "it has more steps than that"
    assert left == {0, 1, 2}, "killed before, between and after the two tables"
