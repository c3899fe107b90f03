"""How unevenly a data set reads the rows of a table: a histogram that a bundle keeps beside the pages.

`tables/NAME.counts` is JSON of a few kilobytes, whatever the table's rows. Ids are grouped by how many requests asked
for them: exactly below 32, else 16 groups per power of two. Sums within a group are exact, so that the mean of a group
is too. A row that no request asked for is in no group.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.errors import InvalidRelease
from embedding_store.release import TableInfo

_OCTAVE_BITS = 4  # 16 groups per power of two


class CountGroup(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Ids that about as many requests asked for."""

    ids: int  # how many
    asked: int  # Σ over the ids: requests that asked for the id, however often each named it
    reads: int  # Σ over the ids: times that it was named, repeats within a request and all


class AccessCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    requests: int  # that were counted, of the data set
    groups: tuple[CountGroup, ...]  # those asked for least come first

    @property
    def ids(self) -> int:
        """Distinct ids that were asked for at all."""
        return sum(group.ids for group in self.groups)

    def columns(self) -> NDArray[np.float64]:
        """float64 [3, groups]: ids, asked, reads."""
        return np.array([(group.ids, group.asked, group.reads) for group in self.groups], np.float64).reshape(-1, 3).T


def count_groups(asked: NDArray[np.int64], reads: NDArray[np.int64], requests: int) -> AccessCounts:
    """asked, reads int64 [ids], as `CountGroup` has them, for each id by itself; zeros are left out."""
    seen = np.flatnonzero(asked)
    asked, reads = asked[seen], reads[seen]
    exponent = np.frexp(asked.astype(np.float64))[1].astype(np.int64) - 1  # floor(log2)
    group = (exponent << _OCTAVE_BITS) + (asked >> np.maximum(exponent - _OCTAVE_BITS, 0))
    _, index, ids = np.unique(group, return_inverse=True, return_counts=True)
    sums = np.zeros((2, len(ids)), np.int64)
    np.add.at(sums[0], index, asked)
    np.add.at(sums[1], index, reads)
    return AccessCounts(requests, tuple(CountGroup(*row) for row in np.stack([ids, *sums], axis=1).tolist()))


def write_counts(folder: Path, name: str, counts: AccessCounts) -> None:
    """FOLDER/NAME.counts"""
    (folder / f"{name}.counts").write_bytes(msgspec.json.encode(counts) + b"\n")


def read_counts(folder: Path, table: TableInfo) -> AccessCounts | None:
    """None where the bundle has no counts of this table. Raises InvalidRelease where they cannot be this table's."""
    path = folder / f"{table.name}.counts"
    try:
        counts = msgspec.json.decode(path.read_bytes(), type=AccessCounts)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidRelease(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InvalidRelease(f"{path}: {error}") from error
    if counts.ids > table.rows:
        raise InvalidRelease(f"{path} counts {counts.ids} ids; table {table.name!r} has {table.rows} rows")
    if any(not 0 < group.ids <= group.asked <= group.reads for group in counts.groups):
        raise InvalidRelease(f"{path}: a group has to have 0 < ids ≤ asked ≤ reads")
    return counts
