"""Releases that are activated, rolled back and removed while threads read: no answer ever mixes two."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from embedding_store.backend import Backend
from embedding_store.chunks import whole_table
from embedding_store.codec import page_rows
from embedding_store.open import open_backend, open_store
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.releases import activate, rollback
from embedding_store.store import EmbeddingStore

ROWS, READERS, LOOKUPS, IDS = 20_000, 4, 130, 2_000  # 1,040,000 rows are read
RELEASES = 4


def write_release(backend: Backend, number: int) -> ReleaseManifest:
    """Two tables whose rows are (release, table, id), int32 each, and the id once more."""
    infos, content = [], {}
    for place, name in enumerate(("item", "user")):
        ids = np.arange(ROWS, dtype=np.int32)
        rows = np.stack((np.full(ROWS, number, np.int32), np.full(ROWS, place, np.int32), ids, ids), axis=1)
        content[name] = rows.tobytes()
        infos.append(TableInfo(name, ROWS, 4, "fp32", 16, page_rows(16), hashlib.sha256(content[name]).hexdigest()))
    manifest = ReleaseManifest("demo", str(number), f"2026-01-0{number + 1}T00:00:00Z", tuple(infos))
    with backend.writer(manifest) as writer:
        for info in infos:
            writer.write(info, whole_table(info, content[info.name]))
        writer.commit()
    return manifest


def read(store: EmbeddingStore, seed: int) -> int:
    """Checks every row; returns how many."""
    rng = np.random.default_rng(seed)
    rows = 0
    for _ in range(LOOKUPS):
        release = store.manifest(model="demo").name
        item = (rng.zipf(1.2, IDS // 2) % ROWS).astype(np.int64)
        user = rng.integers(0, ROWS, IDS - len(item))
        reply = store.lookup(release, {"item": item, "user": user})
        for place, (name, ids) in enumerate((("item", item), ("user", user))):
            answer = reply.tables[name]
            got = answer.rows.view(np.int32)[answer.index]
            number = int(release.partition("@")[2])
            assert (answer.status == 0).all()
            assert (got[:, 0] == number).all()
            assert (got[:, 1] == place).all()
            np.testing.assert_array_equal(got[:, 2], ids)
            rows += len(ids)
    return rows


@contextmanager
def flipping(url: str) -> Iterator[list[str]]:
    """Another client that moves the pointer all the time; gives the releases it has activated so far."""
    done = threading.Event()
    moves: list[str] = []

    def flip() -> None:
        rng = np.random.default_rng(0)
        with open_backend(url) as backend:
            while not done.is_set():
                if rng.random() < 0.3 and len(backend.history("demo")) > 1:
                    moves.append(rollback(backend, "demo")[1])
                else:
                    moves.append(f"demo@{rng.integers(RELEASES)}")
                    activate(backend, moves[-1])
                time.sleep(0.002)

    with ThreadPoolExecutor(1) as pool:
        flips = pool.submit(flip)
        try:
            yield moves
        finally:
            done.set()
            flips.result(30)


@pytest.mark.parametrize("kind", ["memmap", "redis"])
def test_no_answer_mixes_releases(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"memmap://{tmp_path}" if kind == "memmap" else request.getfixturevalue("redis_server").url
    with open_store(url, cache_bytes=400_000) as store:  # a sixth of what the releases take
        for number in range(RELEASES):
            write_release(store.backend, number)
        activate(store.backend, "demo@0")
        with flipping(url) as moves, ThreadPoolExecutor(READERS) as pool:
            total = sum(pool.map(lambda seed: read(store, seed), range(READERS)))
        assert total >= 1_000_000
        assert set(moves) == {f"demo@{number}" for number in range(RELEASES)}
        assert store.stats().total("hits") > 0
