"""A look-up straight out of a bundle's page files: the parity gate scores a bundle before any store has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding_store.errors import UnknownRelease
from embedding_store.lookup import ABSENT, FOUND, EmbeddingLookup, LookupReply, TableRows
from embedding_store.release import ReleaseManifest
from export.bundle import Manifest


class BundleLookup(EmbeddingLookup):
    """Maps the pages, holds no rows. Thread-safe."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._release = ReleaseManifest(manifest.model, manifest.version, manifest.created, manifest.tables)
        self._pages = {
            table.name: np.memmap(
                bundle / "tables" / f"{table.name}.pages", np.uint8, "r", shape=(table.rows, table.row_bytes)
            )
            for table in manifest.tables
        }

    def manifest(self, release: str | None = None, *, model: str | None = None) -> ReleaseManifest:
        if (release or self._release.name) != self._release.name:
            raise UnknownRelease(f"this bundle is release {self._release.name}, not {release}")
        return self._release

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """`timeout` has no effect: nothing here waits for another process."""
        self.manifest(release)
        return LookupReply(release, {name: self._rows(name, wanted) for name, wanted in ids.items()})

    def close(self) -> None:
        self._pages.clear()

    def _rows(self, name: str, wanted: NDArray[np.int64]) -> TableRows:
        table = self._release.table(name)
        unique, index = np.unique(wanted, return_inverse=True)
        known = (unique >= 0) & (unique < table.rows)
        rows = self._pages[name][np.where(known, unique, 0)]
        rows[~known] = np.frombuffer(table.default_row or bytes(table.row_bytes), np.uint8)
        return TableRows(rows, np.where(known, FOUND, ABSENT).astype(np.uint8), index.astype(np.int64))
