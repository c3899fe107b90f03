"""The seam between the store and whatever keeps the pages: files, Redis, or another one to come.

Reading is `fetch`; writing is a `ReleaseWriter`, which makes a namespace that nobody reads before `commit`; what is
served is decided by one pointer per model, changed by compare-and-set. What to do in which order is in `publish.py`
and `releases.py`, once for all backends.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.closing import Closing
from embedding_store.errors import ReleaseConflict
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.sparse_pages import BucketRun

# Releases a model was served from, oldest first; the last one is active. Rollback drops the last.
History = tuple[str, ...]
FETCH_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)  # seconds


def namespace(manifest: ReleaseManifest) -> str:
    """Where a release's pages lie: named by content, so that publishing again goes on in the same place, and two
    publishers with different content under one name never write over each other."""
    return hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()[:16]


def conflict(address: str, release: str) -> ReleaseConflict:
    return ReleaseConflict(f"{address} has a release {release} with other content; a release never changes, so a new "
                           "bundle needs a new version")  # fmt: skip


def moved(address: str, model: str, expected: History, found: History) -> ReleaseConflict:
    return ReleaseConflict(
        f"{address}: the active release of {model} is {found[-1] if found else None}, not "
        f"{expected[-1] if expected else None}: somebody else moved it meanwhile"
    )


class Unfinished(msgspec.Struct, frozen=True):
    """A publication that has not committed: still under way, or its publisher died."""

    release: str
    namespace: str


@dataclass(frozen=True, slots=True)
class NodeStats:
    """One server of a store, since it was opened."""

    address: str
    open: bool  # its circuit breaker is open: it is not asked at the moment
    fetches: int
    failures: int
    seconds: float  # sum over the fetches
    buckets: tuple[int, ...]  # fetches by seconds: at most FETCH_BUCKETS[i] and more than the one before; last: more


class ReleaseWriter(Closing):
    """Writes one release into a namespace of its own. Every call may be repeated: the bytes are the same."""

    @abstractmethod
    def write(self, table: TableInfo, first_page: int, data: memoryview) -> None:
        """Whole pages, beginning with `first_page`; the table's last page may be shorter."""

    @abstractmethod
    def read(self, table: TableInfo, first_page: int, pages: int) -> bytes:
        """The pages as the store has them, one after another; shorter where the store has lost something."""

    @abstractmethod
    def write_buckets(self, table: TableInfo, run: BucketRun) -> None:
        """As `write`, of a table of raw ids."""

    @abstractmethod
    def read_buckets(self, table: TableInfo, run: BucketRun) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """ids int64 [n] and rows uint8 [n, row_bytes] of the buckets of this run as the store has them.

        Raises InvalidRelease where one of them is lost or damaged.
        """

    @abstractmethod
    def write_hot(self, table: TableInfo, ids: bytes) -> None: ...

    @abstractmethod
    def read_hot(self, table: TableInfo) -> bytes: ...

    @abstractmethod
    def mark_verified(self, table: TableInfo) -> None:
        """Makes the table durable and remembers that it needs no second writing."""

    @abstractmethod
    def verified(self) -> frozenset[str]:
        """Names of the tables that an earlier, interrupted publication of this content finished."""

    @abstractmethod
    def commit(self) -> None:
        """Makes the release visible, all at once. Raises ReleaseConflict where the name has other content."""


class Backend(Closing):
    """Thread-safe. Every method raises StoreUnavailable, naming the address, where the store cannot be reached."""

    @property
    @abstractmethod
    def address(self) -> str:
        """For messages: never holds a password."""

    @abstractmethod
    def releases(self) -> dict[str, ReleaseManifest]:
        """All complete releases by name."""

    @abstractmethod
    def unfinished(self) -> list[Unfinished]: ...

    @abstractmethod
    def manifest(self, release: str) -> ReleaseManifest:
        """Raises UnknownRelease; an unfinished release is unknown."""

    @abstractmethod
    def contains(self, manifest: ReleaseManifest) -> bool:
        """Whether this release is complete. Raises ReleaseConflict where its name is taken by other content."""

    @abstractmethod
    def histories(self) -> dict[str, History]:
        """By model, of the models that were ever activated."""

    @abstractmethod
    def history(self, model: str) -> History:
        """Empty where nothing was ever activated."""

    @abstractmethod
    def set_history(self, model: str, expected: History, history: History) -> None:
        """Compare-and-set. Raises ReleaseConflict where the history is not `expected` (nor already `history`)."""

    @abstractmethod
    def fetch(self, release: str, batch: IdBatch, *, timeout: float | None = None) -> FetchedRows:
        """Rows of all tables in one go; ids are unique within a table and of any value.

        `timeout` in seconds, for the whole call. Raises UnknownRelease. What cannot be asked in time is UNAVAILABLE,
        and so is a row whose page the release must have and the store has not: that is damage, not an absent id.
        """

    @property
    def waits(self) -> bool:
        """Whether `fetch` waits for a network: then concurrent misses gain by being fetched together."""
        return True

    def nodes(self) -> Sequence[NodeStats]:
        """What was asked of each server; empty where there is none."""
        return ()

    @abstractmethod
    def hot_ids(self, release: str, table: str) -> NDArray[np.int64]:
        """int64 [k], most frequent first; k may be 0."""

    @abstractmethod
    def writer(self, manifest: ReleaseManifest) -> ReleaseWriter:
        """Raises ReleaseConflict where a complete release of this name has other content, or where another publisher is
        at work on the same namespace and the backend can tell."""

    def active(self, model: str) -> str | None:
        history = self.history(model)
        return history[-1] if history else None
