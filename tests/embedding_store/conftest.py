"""Stores for tests: a new, empty one of each kind."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedding_store import bundle as bundle_files
from embedding_store.backend import Backend
from embedding_store.open import open_backend
from embedding_store.publish import publish
from tests.embedding_store.bundles import Bundle, make_bundle
from tests.embedding_store.damage import TABLES

# A test that takes `url_of` or `url` runs on real servers: those of the kinds that it names.
StoreUrl = Callable[[str], str]


@pytest.fixture
def url_of(request: pytest.FixtureRequest, tmp_path: Path) -> StoreUrl:
    """url_of("redis+cluster"): where an empty store of that kind is; the same for every call in a test."""
    prefix = secrets.token_hex(8)  # servers may be shared

    def make(kind: str) -> str:
        if kind == "memmap":
            return f"memmap://{tmp_path / 'store'}"
        if kind == "redis+cluster":
            return f"{request.getfixturevalue('redis_cluster').url}?prefix={prefix}"
        server = request.getfixturevalue("redis_server")
        return str(server.url) if kind == "redis+unix" else f"{server.tcp_url}/3?prefix={prefix}"

    return make


@pytest.fixture
def opened() -> Iterator[Callable[[str], Backend]]:
    """opened(url): a backend of its own, closed at the end."""
    backends: list[Backend] = []

    def open_one(url: str) -> Backend:
        backends.append(open_backend(url))
        return backends[-1]

    yield open_one
    for backend in backends:
        backend.close()


@pytest.fixture
def backend(url: str) -> Iterator[Backend]:
    """Of the module's `url`."""
    with open_backend(url) as backend:
        yield backend


@pytest.fixture
def bundle(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Published, in many chunks: a release to be damaged."""
    monkeypatch.setattr(bundle_files, "_CHUNK_BYTES", 16_384)
    made = make_bundle(tmp_path / "bundle", seed=11, tables=TABLES)
    publish(made.folder, backend)
    return made
