"""The seam between whoever needs embedding rows and whoever has them.

`EmbeddingLookup` is implemented by `store.EmbeddingStore` (cache and backend in this process) and by
`client.SidecarClient` (a sidecar next door); a scorer takes either and cannot tell.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding_store.closing import Closing
from embedding_store.release import ReleaseManifest

# Status of one row of a reply.
FOUND = 0
ABSENT = 1  # the table has no such id: normal; the row is the table's default
UNAVAILABLE = 2  # the store could not be asked: degraded; the row is the table's default
STALE = 3  # the store could not be asked: degraded; the row is that of an earlier release of the model


@dataclass(frozen=True, slots=True)
class TableRows:
    """The answer for one table. Rows stay encoded; several asked ids may share one row.

    rows: uint8 [m, row_bytes]; status: uint8 [m]; index: int64 [n], the row of each asked id.
    """

    rows: NDArray[np.uint8]
    status: NDArray[np.uint8]
    index: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LookupReply:
    """All of it from the one release that is named."""

    release: str
    tables: Mapping[str, TableRows]


class EmbeddingLookup(Closing):
    """Thread-safe."""

    @abstractmethod
    def manifest(self, release: str | None = None, *, model: str | None = None) -> ReleaseManifest:
        """The tables of `release` (`model@version`), else of the active release of `model`.

        Raises UnknownRelease, StoreUnavailable.
        """

    @abstractmethod
    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        """Rows of all tables of a request at once; ids int64 [n] per table, duplicates welcome, n may be 0.

        `timeout` is in seconds. Raises UnknownRelease, UnknownTable, StoreUnavailable.
        """
