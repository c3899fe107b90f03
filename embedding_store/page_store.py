"""The pages of one release, wherever they lie: written, read back and compared. Who may do so when is not said here:
a `ReleaseWriter` has a namespace to itself, `mend.py` works on a release that is being read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from embedding_store.chunks import Chunk
from embedding_store.errors import InvalidRelease
from embedding_store.release import TableInfo

SAME, CHANGED, LOST = range(3)  # a page in the store against the bundle's; LOST: it, or its end, is not there


def nothing() -> None:
    pass


class PageStore(ABC):
    """Every call may be repeated: the bytes are the same. Raises StoreUnavailable, naming the store's address."""

    @property
    @abstractmethod
    def address(self) -> str: ...

    @abstractmethod
    def write(self, table: TableInfo, chunk: Chunk) -> None:
        """Whoever reads meanwhile finds each page as it was, or as it is written, or not at all."""

    @abstractmethod
    def compare(self, table: TableInfo, chunk: Chunk) -> NDArray[np.uint8]:
        """uint8 [chunk.pages]: SAME, CHANGED or LOST."""

    def verify(self, table: TableInfo, chunk: Chunk) -> None:
        """Reads the chunk back. Raises InvalidRelease where the store does not give back the same."""
        different = np.flatnonzero(self.compare(table, chunk))
        if len(different):
            page = chunk.first_page + int(different[0])
            raise InvalidRelease(f"{self.address} gives back page {page} of table {table.name!r} not as it was written")

    @abstractmethod
    def write_hot(self, table: TableInfo, ids: bytes) -> None: ...

    @abstractmethod
    def read_hot(self, table: TableInfo) -> bytes | None:
        """None where there is none."""

    @abstractmethod
    def lost_pages(self, table: TableInfo, meanwhile: Callable[[], None] = nothing) -> int:
        """How many pages are not there or do not have their length; what is in them is not read. `meanwhile` is called
        every few seconds at least."""

    @abstractmethod
    def sync(self, table: TableInfo) -> None:
        """Makes durable what was written of the table, where the store leaves that to us."""
