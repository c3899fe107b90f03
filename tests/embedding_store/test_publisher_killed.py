"""kill -9 of a real publisher at every kind of step: what is served stays, and publishing again completes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedding_store.errors import UnknownRelease
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.releases import activate
from tests.embedding_store.bundles import check_rows, fetch, make_bundle

# Publishes and kills itself by SIGKILL when the given step, or a file system or Redis call named here, comes.
PUBLISHER = """
import os, signal, sys
from pathlib import Path
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.releases import activate

url, bundle, step = sys.argv[1:]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

backend = open_backend(url)
if step in ("mark_verified", "commit", "write_hot"):
    make = backend.writer
    def writer(manifest):
        made = make(manifest)
        setattr(made, step, die)
        return made
    backend.writer = writer
if step == "rename":
    Path.rename = die
if step == "replace":
    replace, counter = Path.replace, [0]
    def third(*args):
        counter[0] += 1
        return die() if counter[0] == 3 else replace(*args)
    Path.replace = third
if step == "set_history":
    backend.set_history = die

def progress(name, done, total):
    if name == step:
        die()

manifest = publish(Path(bundle), backend, progress=progress)
activate(backend, manifest.name)
"""

STEPS = (
    "writing item",
    "verifying item",
    "write_hot",
    "mark_verified",
    "verified item",
    "verifying broad",
    "verified broad",
    "commit",
)
BY_BACKEND = {"memmap": (*STEPS, "replace", "rename", "set_history"), "redis": (*STEPS, "set_history")}


@pytest.mark.parametrize(("kind", "step"), [(kind, step) for kind, steps in BY_BACKEND.items() for step in steps])
def test_the_active_release_survives_and_publishing_again_completes(
    kind: str, step: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"memmap://{tmp_path / 'store'}" if kind == "memmap" else request.getfixturevalue("redis_server").url
    old = make_bundle(tmp_path / "old", 1)
    new = make_bundle(tmp_path / "new", 2, version="2")
    with open_backend(url) as backend:
        publish(old.folder, backend)
        activate(backend, old.name)

    command = [sys.executable, "-c", PUBLISHER, url, str(new.folder), step]
    died = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr

    ids = np.arange(-10, 5010, dtype=np.int64)
    with open_backend(url) as backend:
        assert backend.active("demo") == old.name
        check_rows(old, "item", ids, *fetch(backend, old.name, {"item": ids})["item"])
        if step == "set_history":
            assert backend.manifest(new.name) == new.manifest
        else:
            with pytest.raises(UnknownRelease):
                backend.manifest(new.name)
            assert [(stored.release, stored.state) for stored in backend.inventory()] == [
                (old.name, "ready"),
                (new.name, "unfinished"),
            ]

        assert publish(new.folder, backend) == new.manifest
        activate(backend, new.name)
        assert backend.active("demo") == new.name
        assert {stored.state for stored in backend.inventory()} == {"ready"}
        for table in new.manifest.tables:
            rows, found = fetch(backend, new.name, {table.name: ids})[table.name]
            check_rows(new, table.name, ids, rows, found)
            np.testing.assert_array_equal(backend.hot_ids(new.name, table.name), new.hot[table.name])
