"""The seam between the store and whatever keeps the pages: files, Redis, or another one to come.

Reading is `fetch`; writing is a `ReleaseWriter`, which makes a namespace that nobody reads before `commit`; what is
served is decided by one pointer per model, changed by compare-and-set. What to do in which order is in `publish.py`,
`releases.py` and `gc.py`, once for all backends.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.closing import Closing
from embedding_store.errors import InvalidRelease, ReleaseConflict
from embedding_store.page_store import PageStore
from embedding_store.release import ReleaseManifest, TableInfo

# Releases a model was served from, oldest first; the last one is active. Rollback drops the last.
History = tuple[str, ...]
FETCH_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)  # seconds


def namespace(manifest: ReleaseManifest) -> str:
    """Where a release's pages lie: named by content, so that publishing again goes on in the same place, and two
    publishers with different content under one name never write over each other."""
    return hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()[:16]


def check_current(address: str, manifest: ReleaseManifest) -> None:
    """Before any of its rows is read. Raises InvalidRelease."""
    if not manifest.is_current:
        raise InvalidRelease(
            f"{address}: {manifest.name} was published by an older torchrank: export and publish it again"
        )


def conflict(address: str, release: str, *, removed: bool = False) -> ReleaseConflict:
    has = "had, until gc removed it," if removed else "has"
    return ReleaseConflict(f"{address} {has} a release {release} with other content; a release never changes, so a new "
                           "bundle needs a new version")  # fmt: skip


def moved(address: str, model: str, expected: History, found: History) -> ReleaseConflict:
    return ReleaseConflict(
        f"{address}: the active release of {model} is {found[-1] if found else None}, not "
        f"{expected[-1] if expected else None}: somebody else moved it meanwhile"
    )


def hot_list(address: str, release: str, table: TableInfo, content: bytes | None) -> NDArray[np.int64]:
    """int64 [table.hot_ids], out of what a store has of it; empty where it has nothing. Raises InvalidRelease."""
    if content is not None and len(content) != 8 * table.hot_ids:
        raise InvalidRelease(
            f"{address}: the hot list of {release}'s table {table.name!r} has {len(content)} bytes; "
            f"{table.hot_ids} ids take {8 * table.hot_ids}; `torchrank verify BUNDLE --store URL --mend` mends it"
        )
    return np.frombuffer(content or b"", "<i8").astype(np.int64)


class Stored(msgspec.Struct, frozen=True):
    """A release in a store, whatever has become of it."""

    release: str
    namespace: str
    state: Literal["ready", "unfinished", "removing"]
    manifest: ReleaseManifest | None  # None: its publisher died before it had written that
    idle: float  # seconds since it was published, or was last the active one; unfinished: since it was last worked on
    publisher: bool = False  # one is at work on it, or was so lately that it may be

    @property
    def bytes(self) -> int:
        """Of its tables, once they are all there."""
        return sum(table.bytes + table.ids_bytes for table in self.manifest.tables) if self.manifest else 0


class Verified(msgspec.Struct, frozen=True):
    """How far an earlier, interrupted publication of a table came."""

    pages: int
    digest: str  # of the bundle's files up to there: `chunks.Checksum`


@dataclass(frozen=True, slots=True)
class NodeStats:
    """One server of a store, since it was opened."""

    address: str
    open: bool  # its circuit breaker is open: it is not asked at the moment
    fetches: int
    failures: int
    seconds: float  # sum over the fetches
    buckets: tuple[int, ...]  # fetches by seconds: at most FETCH_BUCKETS[i] and more than the one before; last: more


class ReleaseWriter(PageStore, Closing):
    """Writes one release into a namespace of its own."""

    @abstractmethod
    def mark_verified(self, table: TableInfo, verified: Verified) -> None:
        """Makes the table durable so far, and remembers that this part needs no second writing."""

    @abstractmethod
    def verified(self) -> dict[str, Verified]:
        """By table, what an earlier, interrupted publication of this content finished."""

    @abstractmethod
    def renew(self) -> None:
        """To be called every few seconds: as long as it is, nobody takes the publication for abandoned.

        Raises ReleaseConflict where another publisher has taken over, or the pages were removed.
        """

    @abstractmethod
    def commit(self) -> None:
        """Makes the release visible, all at once. Raises ReleaseConflict as `renew`, and where the name has other
        content."""


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
    def inventory(self) -> list[Stored]:
        """Everything that takes room: complete releases by name, then unfinished ones and those half removed."""

    @abstractmethod
    def manifest(self, release: str, *, timeout: float | None = None) -> ReleaseManifest:
        """`timeout` in seconds, for a look-up that cannot wait longer. Raises UnknownRelease; an unfinished release is
        unknown."""

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
        """Compare-and-set. Raises ReleaseConflict where the history is not `expected` (nor already `history`), and
        UnknownRelease where the store has not, or no longer, the last release of `history`."""

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
        """int64 [k], most frequent first: as many as the manifest says, or none where the list was lost.

        Raises InvalidRelease where there is another number of them."""

    def create(self) -> None:
        """Makes an empty store, where the first publication has to."""

    @abstractmethod
    def preflight(self, manifest: ReleaseManifest, *, room: int | None = None) -> None:
        """Raises StoreNotReady, saying what to set, where publishing this would fail: rights, settings, and room for so
        many bytes (None: for what is not written yet)."""

    @abstractmethod
    def writer(self, manifest: ReleaseManifest) -> ReleaseWriter:
        """Raises ReleaseConflict where a complete release of this name has other content, or where another publisher is
        at work on the same namespace."""

    @abstractmethod
    def pages(self, release: str) -> PageStore:
        """Of a complete release, to be looked at and mended. Raises UnknownRelease."""

    @abstractmethod
    def pin(self, owner: str, releases: Collection[str], seconds: float) -> frozenset[str]:
        """For the next `seconds`, or until the owner's next call, gc leaves these alone; with none, the pin ends.

        Returns those that the store has: they are safe now. Raises StoreUnavailable, also where it is read-only.
        """

    @abstractmethod
    def pins(self) -> dict[str, list[str]]:
        """Release -> owners whose pins hold."""

    @abstractmethod
    def take_out(self, stored: Stored) -> None:
        """Makes a release invisible for good; its bytes stay until `erase`. May be repeated.

        Raises ReleaseConflict where it has become active, was pinned, or is being published meanwhile.
        """

    @abstractmethod
    def erase(self, stored: Stored) -> Iterator[int]:
        """Removes the bytes of what was taken out, in small batches; yields after each how many keys or files it had.
        Stopped anywhere, it may be called again."""

    def forget(self, release: str) -> None:
        """Lets go of what is kept of a release that is read no more: its manifest, its mapped files."""

    def active(self, model: str) -> str | None:
        history = self.history(model)
        return history[-1] if history else None
