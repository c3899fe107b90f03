"""Pages whose bytes were changed at the same length, in every store: their rows are refused, or right; never wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.backend import Backend
from embedding_store.batch import batch_of
from embedding_store.codec import decode
from embedding_store.lookup import ABSENT, FOUND, UNAVAILABLE
from embedding_store.mend import mend
from embedding_store.open import open_backend
from embedding_store.publish import publish
from tests.embedding_store.bundles import Bundle, check_release, make_bundle
from tests.embedding_store.conftest import StoreUrl
from tests.embedding_store.corruptions import ANOTHER, CORRUPTIONS, TABLES
from tests.embedding_store.damage import Files, damager

KINDS = ("memmap", "redis+unix", "redis", "redis+cluster")


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, url_of: StoreUrl) -> str:
    return url_of(request.param)


@pytest.fixture
def bundle(tmp_path: Path, backend: Backend) -> Bundle:
    made = make_bundle(tmp_path / "bundle", seed=3, tables=TABLES)
    publish(made.folder, backend)
    return made


def statuses(backend: Backend, bundle: Bundle, table: str, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [n], after a look at the rows: none is wrong unflagged, and what is flagged comes with a reason."""
    fetched = backend.fetch(bundle.name, batch_of(bundle.manifest, {table: ids}))
    expected, there = bundle.expected(table, ids)
    info = bundle.manifest.table(table)
    found = fetched.status == FOUND
    assert there[found].all()
    rows = fetched.rows.reshape(len(ids), info.row_bytes)
    np.testing.assert_array_equal(decode(info.codec, rows[found]), expected[found])
    assert not there[fetched.status == ABSENT].any(), "ids that the release has were called absent"
    assert (fetched.error is None) == (fetched.status != UNAVAILABLE).all()
    if fetched.error is not None:
        text = str(fetched.error)
        assert f"table {table!r} of {bundle.name}" in text
        assert "damaged" in text
        assert "torchrank verify BUNDLE --store URL --mend" in text
    return fetched.status


def known_and_absent(bundle: Bundle, table: str) -> NDArray[np.int64]:
    known = np.array(list(bundle.raw.get(table, range(bundle.manifest.table(table).rows))), np.int64)
    others = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, len(known))
    return np.unique(np.concatenate((known, others, np.array([-5, 1500, 2**40]))))


@pytest.mark.parametrize("table", ANOTHER)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_what_is_not_refused_is_right(backend: Backend, bundle: Bundle, url: str, table: str, corruption: str) -> None:
    ids, other = known_and_absent(bundle, table), known_and_absent(bundle, ANOTHER[table])
    for seed in range(3, 6):  # in whose 6,000 rows of garbage none has its check by chance, as one in 65,536 has
        CORRUPTIONS[corruption](damager(backend, bundle.name), table, np.random.default_rng(seed))
        refused = statuses(backend, bundle, table, ids) == UNAVAILABLE
        assert refused.any(), seed
        with open_backend(url) as another:
            np.testing.assert_array_equal(statuses(another, bundle, table, ids) == UNAVAILABLE, refused)
        alone = statuses(backend, bundle, table, ids[refused][:20])  # not only in one look-up with all others
        assert (alone == UNAVAILABLE).all(), seed
        assert (statuses(backend, bundle, ANOTHER[table], other) != UNAVAILABLE).all(), seed
        assert [damage.table for damage in mend(bundle.folder, backend)] == [table]
        check_release(backend, bundle)


def test_of_a_page_only_the_row_that_was_changed_is_refused(backend: Backend, bundle: Bundle) -> None:
    ids, width = np.arange(1500), bundle.manifest.table("item").stored_bytes
    it = damager(backend, bundle.name)
    piece = it.pieces("item")[2]
    for row, byte in ((0, 0), (3, 17), (100, width - 1)):
        content = bytearray(it.read(piece))
        content[row * width + byte] ^= 16
        it.write(piece, bytes(content))
    first = 2 * bundle.manifest.table("item").page_rows
    refused = np.flatnonzero(statuses(backend, bundle, "item", ids) == UNAVAILABLE)
    assert refused.tolist() == [first, first + 3, first + 100]


def test_of_a_bucket_only_the_row_that_was_changed_is_refused(backend: Backend, bundle: Bundle) -> None:
    ids = known_and_absent(bundle, "raw")
    it = damager(backend, bundle.name)
    piece = it.pieces("raw")[5]
    content = bytearray(it.read(piece))
    content[-1] ^= 1
    it.write(piece, bytes(content))
    refused = statuses(backend, bundle, "raw", ids) == UNAVAILABLE
    there = bundle.expected("raw", ids)[1]
    assert np.count_nonzero(refused & there) == 1
    if isinstance(it, Files):  # absent ids beside it can no longer be told
        assert np.count_nonzero(refused) < 10
    else:
        assert np.count_nonzero(refused) == 1
