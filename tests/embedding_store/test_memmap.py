"""What only the memory-mapped backend can get wrong: its directory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from embedding_store.errors import ReleaseConflict, StoreUnavailable
from embedding_store.memmap import MemmapBackend
from embedding_store.memmap_writer import writing_folder
from embedding_store.publish import publish
from tests.embedding_store.bundles import Bundle, check_rows, fetch, make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=3)


def test_a_release_is_the_files_of_its_bundle(tmp_path: Path, bundle: Bundle) -> None:
    with MemmapBackend(tmp_path / "deep" / "store") as backend:
        publish(bundle.folder, backend)
    release = tmp_path / "deep" / "store" / "releases" / "demo@1"
    bundled = {path.name: path.read_bytes() for path in (bundle.folder / "tables").iterdir()}
    assert {path.name: path.read_bytes() for path in (release / "tables").iterdir()} == bundled
    assert list((tmp_path / "deep" / "store" / "writing").iterdir()) == []


def test_one_publisher_at_a_time(tmp_path: Path, bundle: Bundle) -> None:
    with MemmapBackend(tmp_path / "store") as backend:
        with (
            backend.writer(bundle.manifest),
            pytest.raises(ReleaseConflict, match="another publisher is writing demo@1 at this moment"),
        ):
            publish(bundle.folder, MemmapBackend(tmp_path / "store"))
        publish(bundle.folder, backend)


def test_a_publisher_that_cannot_begin_leaves_the_place_to_others(tmp_path: Path, bundle: Bundle) -> None:
    in_the_way = writing_folder(tmp_path / "store", bundle.manifest) / "manifest.json"
    in_the_way.mkdir(parents=True)
    with MemmapBackend(tmp_path / "store") as backend:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StoreUnavailable, match="Is a directory"):
            backend.writer(bundle.manifest)
        assert len(os.listdir("/proc/self/fd")) == before
        assert sorted(os.listdir(in_the_way.parent)) == ["manifest.json", "tables"]
        in_the_way.rmdir()
        publish(bundle.folder, backend)


def test_a_pin_that_ends_leaves_nothing(tmp_path: Path) -> None:
    with MemmapBackend(tmp_path / "store") as backend:
        backend.create()
        before = len(os.listdir("/proc/self/fd"))
        for number in range(3):
            backend.pin(f"host-{number}", ["demo@1"], 60)
            assert backend.pins() == {"demo@1": [f"host-{number}"]}
            backend.pin(f"host-{number}", [], 60)
        assert len(os.listdir("/proc/self/fd")) == before
        assert os.listdir(tmp_path / "store" / "pins") == [".lock"]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    backend = MemmapBackend(tmp_path / "store")
    for ask in (
        backend.releases,
        backend.histories,
        lambda: backend.manifest("demo@1"),
        lambda: backend.active("demo"),
    ):
        with pytest.raises(StoreUnavailable, match=r"store cannot be reached: there is no such directory"):
            ask()


def test_mapped_pages_outlive_their_files(tmp_path: Path, bundle: Bundle) -> None:
    """A release that is deleted while it is served: what was mapped stays readable."""
    ids = np.arange(-5, 5005, dtype=np.int64)
    with MemmapBackend(tmp_path / "store") as backend:
        publish(bundle.folder, backend)
        fetch(backend, bundle.name, {"item": ids})
        (tmp_path / "store" / "releases" / "demo@1" / "tables" / "item.pages").unlink()
        check_rows(bundle, "item", ids, *fetch(backend, bundle.name, {"item": ids})["item"])
        (tmp_path / "store" / "releases" / "demo@1" / "tables" / "user.pages").unlink()
        with pytest.raises(StoreUnavailable, match=r"user.pages: No such file or directory"):
            fetch(backend, bundle.name, {"user": ids})
