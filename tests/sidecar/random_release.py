"""A release of random tables, and its publication by the backend's own writer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import Backend
from embedding_store.chunks import whole_table
from embedding_store.release import ReleaseManifest, TableInfo

SHAPES = {"item": (5000, 16), "user": (900, 8), "category": (37, 4)}  # rows, dim; fp16


@dataclass(frozen=True)
class Release:
    """What was published: float16 tables [rows, dim], as numpy has them."""

    manifest: ReleaseManifest
    tables: Mapping[str, NDArray[np.float16]]
    hot: Mapping[str, NDArray[np.int64]]

    def expected(self, table: str, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """float16 [n, dim] by plain indexing; the default row, all 0.5, where there is no such id."""
        rows = self.tables[table]
        known = (ids >= 0) & (ids < len(rows))
        out = np.full((len(ids), rows.shape[1]), 0.5, np.float16)
        out[known] = rows[ids[known]]
        return out

    def random_ids(self, rng: np.random.Generator, count: int) -> dict[str, NDArray[np.int64]]:
        """Per table: `count` ids with duplicates, some of them absent."""
        return {name: rng.integers(-3, len(rows) + 3, count) for name, rows in self.tables.items()}


def make_release(
    version: str, seed: int, shapes: Mapping[str, tuple[int, int]] = SHAPES, *, model: str = "feed"
) -> Release:
    rng = np.random.default_rng(seed)
    tables = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    hot = {name: rng.permutation(len(rows))[: len(rows) // 2].astype(np.int64) for name, rows in tables.items()}
    infos = [
        TableInfo(
            name, len(rows), rows.shape[1], "fp16", 2 * rows.shape[1], 63,
            hashlib.sha256(rows.tobytes()).hexdigest(), len(hot[name]), np.full(rows.shape[1], 0.5, "<f2").tobytes(),
        )
        for name, rows in tables.items()
    ]  # fmt: skip
    return Release(ReleaseManifest(model, version, "2024-06-11T00:00:00Z", tuple(infos)), tables, hot)


def put(backend: Backend, release: Release) -> None:
    """Publishes by the backend's own writer, and activates."""
    with backend.writer(release.manifest) as writer:
        for table in release.manifest.tables:
            writer.write(table, whole_table(table, release.tables[table.name].tobytes()))
            writer.write_hot(table, release.hot[table.name].tobytes())
        writer.commit()
    model = release.manifest.model
    history = backend.history(model)
    backend.set_history(model, history, (*history, release.manifest.name))
