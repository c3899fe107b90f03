"""Files that processes have mapped are mended in place."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from embedding_store.backend import Backend
from embedding_store.errors import StoreNotReady, StoreUnavailable
from embedding_store.mend import TableDamage, mend
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.release import CHECK_BYTES
from tests.embedding_store.bundles import Bundle, check_release, fetch
from tests.embedding_store.conftest import StoreUrl
from tests.embedding_store.damage import ITEM_PAGES, Files, damager
from tests.embedding_store.test_mend import check_mended


@pytest.fixture
def url(url_of: StoreUrl) -> str:
    return url_of("memmap")


@pytest.fixture
def files(backend: Backend, bundle: Bundle) -> Files:
    check_release(backend, bundle)  # maps all
    found = damager(backend, bundle.name)
    assert isinstance(found, Files)
    return found


def test_they_are_mended_in_place(backend: Backend, bundle: Bundle, files: Files, url: str) -> None:
    paths = [files.folder / name for name in ("item.pages", "raw.pages", "raw.ids")]
    before = [path.stat().st_ino for path in paths]
    files.change("item", 4)
    files.cut("item", 20)
    os.truncate(files.folder / "raw.ids", 1001)
    with (files.folder / "raw.pages").open("r+b") as file:
        file.write(b"?")
    with pytest.raises(StoreUnavailable, match=r"item.pages has \d+ bytes; release demo@1 must have 306000"):
        fetch(backend, bundle.name, {"item": np.arange(5)})
    assert [damage.table for damage in mend(bundle.folder, backend)] == ["item", "raw"]
    assert [path.stat().st_ino for path in paths] == before
    check_mended(backend, bundle, url)


@pytest.mark.parametrize("name", ["item.pages", "raw.ids"])
def test_one_that_was_removed(backend: Backend, bundle: Bundle, files: Files, url: str, name: str) -> None:
    (files.folder / name).unlink()
    (damage,) = publish(bundle.folder, backend).mended
    assert damage.lost == ((0, damage.pages - 1),)
    check_mended(backend, bundle, url)


def test_one_that_is_too_long(backend: Backend, bundle: Bundle, files: Files, url: str) -> None:
    with (files.folder / "item.pages").open("ab") as file:
        file.write(b"more")
    assert publish(bundle.folder, backend).mended == (
        TableDamage("item", ITEM_PAGES, changed=((ITEM_PAGES - 1, ITEM_PAGES - 1),)),
    )
    check_mended(backend, bundle, url)


def test_a_folder_without_manifest_is_in_the_way(bundle: Bundle, files: Files, url: str) -> None:
    (files.folder.parent / "manifest.json").unlink()
    with open_backend(url) as another:
        with pytest.raises(StoreNotReady, match=r"releases/demo@1 is in the way, and no release"):
            publish(bundle.folder, another)
        shutil.rmtree(files.folder.parent)
        assert publish(bundle.folder, another).new
    with open_backend(url) as another:
        check_release(another, bundle)


def test_a_file_that_was_cut_has_its_size_last(
    backend: Backend, bundle: Bundle, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or those who read would take the zeros between for rows: after every write, what is found is right."""
    files.cut("item", 5)
    files.lose("user", 2)
    pwrite = os.pwrite
    statuses: list[str] = []

    def watched(handle: int, content: bytes, at: int) -> int:
        written = pwrite(handle, bytes(content)[:3000], at)
        for table in ("item", "user"):
            try:
                fetched = fetch(backend, bundle.name, {table: np.arange(1300)})[table][0]
            except StoreUnavailable:
                statuses.append("unavailable")
            else:
                statuses.append("whole")
                stored = np.fromfile(bundle.folder / "tables" / f"{table}.pages", np.uint8)
                width = fetched.shape[1]
                np.testing.assert_array_equal(stored.reshape(-1, width + CHECK_BYTES)[: len(fetched), :width], fetched)
        return written

    monkeypatch.setattr(os, "pwrite", watched)
    mend(bundle.folder, backend)
    assert statuses.count("unavailable") > 50
    assert statuses[-2:] == ["whole", "whole"]
