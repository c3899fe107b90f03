"""What a sidecar needs of the store it serves, beside the look-ups themselves.

`store.EmbeddingStore` (cache and backend) and `memory.MemoryStore` implement it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.lookup import EmbeddingLookup, LookupReply


class ReleaseEntry(msgspec.Struct, frozen=True):
    """One line of a list of releases."""

    release: str  # model@version
    model: str
    version: str
    created: str  # UTC, ISO 8601
    active: bool


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters since the store was opened, in unique ids; sizes in bytes."""

    hits: int  # unique ids answered from the cache
    misses: int  # unique ids asked of the backend
    cache_bytes: int  # in use
    cache_capacity_bytes: int


class ServedLookup(EmbeddingLookup):
    @abstractmethod
    def releases(self) -> Sequence[ReleaseEntry]:
        """Every complete release, whatever its model. Raises StoreUnavailable."""

    @abstractmethod
    def warm(self, release: str) -> int:
        """Fills the cache from the tables' hot lists, most frequent ids first; returns how many rows it took."""

    @abstractmethod
    def stats(self) -> StoreStats: ...

    @abstractmethod
    def lookup_resident(self, release: str, ids: Mapping[str, NDArray[np.int64]]) -> LookupReply | None:
        """`lookup` where that waits for nobody: every row is in this host's memory or page cache.

        None where a row has to come over a network; the caller then takes `lookup`, in a thread that may wait.
        Raises UnknownRelease, UnknownTable.
        """
