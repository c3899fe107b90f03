"""A look-up straight out of a bundle's page files: the parity gate scores a bundle before any store has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import batch_of
from embedding_store.errors import UnknownRelease
from embedding_store.lookup import ABSENT, EmbeddingLookup, LookupReply, TableRows
from embedding_store.memmap_read import MappedTables
from embedding_store.release import ReleaseManifest
from embedding_store.release_view import default_row
from export.bundle import Manifest


class BundleLookup(EmbeddingLookup):
    """Maps the pages, holds no rows. Thread-safe."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._release = ReleaseManifest(manifest.model, manifest.version, manifest.created, manifest.tables)
        self._tables = MappedTables(self._release, bundle / "tables")

    def manifest(self, release: str | None = None, *, model: str | None = None) -> ReleaseManifest:
        if (release or self._release.name) != self._release.name:
            raise UnknownRelease(f"this bundle is release {self._release.name}, not {release}")
        return self._release

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """`timeout` has no effect: nothing here waits for another process. Raises StoreUnavailable for lost files."""
        self.manifest(release)
        unique = {name: np.unique(wanted, return_inverse=True) for name, wanted in ids.items()}
        batch = batch_of(self._release, {name: distinct for name, (distinct, _) in unique.items()})
        fetched = self._tables.fetch(batch)
        if fetched.error is not None:
            raise fetched.error
        answer, first, start = {}, 0, 0
        for name, (distinct, index) in unique.items():
            table = self._release.table(name)
            last, end = first + len(distinct), start + len(distinct) * table.row_bytes
            rows, status = fetched.rows[start:end].reshape(len(distinct), table.row_bytes), fetched.status[first:last]
            rows[status == ABSENT] = default_row(table)
            answer[name] = TableRows(rows, status, index)
            first, start = last, end
        return LookupReply(release, answer)

    def close(self) -> None:
        """The files are unmapped when this object goes."""
