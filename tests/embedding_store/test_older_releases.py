"""Releases and bundles from before rows had checks, and readers of that time: refused, not read as something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from embedding_store.backend import Backend, namespace
from embedding_store.bundle import read_release_manifest
from embedding_store.errors import InvalidRelease, ReleaseConflict
from embedding_store.gc import collect
from embedding_store.memmap import MemmapBackend
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.redis_backend import RedisBackend
from embedding_store.release import decode_manifest
from embedding_store.store import EmbeddingStore
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.embedding_store.conftest import StoreUrl

TABLES = (TestTable("item", "fp16", rows=900, dim=16, hot=50), TestTable("raw", "fp32", rows=400, dim=8, sparse=True))
OLDER = "by an older torchrank: export and publish it again"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=7, tables=TABLES)


@pytest.fixture(params=["memmap", "redis", "redis+cluster"])
def url(request: pytest.FixtureRequest, url_of: StoreUrl, bundle: Bundle) -> str:
    """Of a store with the bundle's release."""
    url = url_of(request.param)
    with open_backend(url) as backend:
        publish(bundle.folder, backend)
    return url


@pytest.fixture
def backend(url: str) -> Iterator[Backend]:
    with open_backend(url) as backend:
        yield backend


def stored(backend: Backend, release: str) -> dict[str, Any]:
    """What the store says of a release."""
    if isinstance(backend, RedisBackend):
        value = cast(bytes, backend.control.hget(backend.key("releases"), release))
        return cast(dict[str, Any], json.loads(value)["manifest"])
    assert isinstance(backend, MemmapBackend)
    return cast(dict[str, Any], json.loads((backend._release_folder(release) / "manifest.json").read_text()))


def make_older(backend: Backend, release: str) -> None:
    manifest = stored(backend, release)
    for table in manifest["tables"]:
        del table["check_bytes"]
    if isinstance(backend, RedisBackend):
        key = backend.key("releases")
        value = json.loads(cast(bytes, backend.control.hget(key, release)))
        backend.control.hset(key, release, json.dumps({**value, "manifest": manifest}))
    else:
        assert isinstance(backend, MemmapBackend)
        (backend._release_folder(release) / "manifest.json").write_text(json.dumps(manifest))


def test_an_older_reader_finds_a_field_that_it_does_not_know(backend: Backend, bundle: Bundle) -> None:
    """It forbids such in tables."""
    assert [table["check_bytes"] for table in stored(backend, bundle.name)["tables"]] == [2, 2]


def test_an_older_release_is_refused_listed_and_removed(url: str, backend: Backend, bundle: Bundle) -> None:
    make_older(backend, bundle.name)
    with EmbeddingStore(open_backend(url)) as store:
        for _ in range(2):
            with pytest.raises(InvalidRelease, match=rf"{bundle.name} was published {OLDER}"):
                store.lookup(bundle.name, {"item": np.arange(3)})
            assert list(store.backend.releases()) == [bundle.name]
    with pytest.raises(ReleaseConflict, match="has a release demo@1 with other content"):
        publish(bundle.folder, backend)
    assert [decision.release for decision in collect(backend, keep=0, grace=0) if decision.removed] == [bundle.name]
    assert backend.releases() == {}


def test_an_older_manifest_is_encoded_as_it_was(bundle: Bundle) -> None:
    """Its namespace, by which it lies in a store, is a checksum of that."""
    encoded = msgspec.json.encode(bundle.manifest)
    assert decode_manifest(encoded) == bundle.manifest
    older = encoded.replace(b',"check_bytes":2', b"")
    assert older != encoded
    assert not decode_manifest(older).is_current
    assert msgspec.json.encode(decode_manifest(older)) == older
    assert namespace(decode_manifest(older)) != namespace(bundle.manifest)


def test_an_older_bundle_is_refused(bundle: Bundle) -> None:
    path = bundle.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for table in manifest["tables"]:
        del table["check_bytes"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InvalidRelease, match=rf"manifest\.json: exported {OLDER}"):
        read_release_manifest(bundle.folder)


@pytest.mark.parametrize("others", [0, 4, "2"])
def test_checks_of_another_width_are_refused(bundle: Bundle, others: object) -> None:
    manifest = json.loads(msgspec.json.encode(bundle.manifest))
    manifest["tables"][0]["check_bytes"] = others
    with pytest.raises(msgspec.DecodeError, match="check_bytes"):
        decode_manifest(json.dumps(manifest).encode())
