"""A complete release against its bundle: what of it the store has lost or changed since, and writing that again.

Whoever reads meanwhile can only gain: what is written is what the release always was. Rows whose bytes had changed are
in nobody's cache: readers refuse them (`row_checks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import Backend
from embedding_store.bundle import read_chunks, read_release_manifest
from embedding_store.chunks import Checksum
from embedding_store.errors import InvalidRelease, UnknownRelease
from embedding_store.holding import Hold
from embedding_store.pace import Pace
from embedding_store.page_store import CHANGED, LOST, PageStore, nothing
from embedding_store.pages import read_hot
from embedding_store.progress import Progress, no_progress
from embedding_store.release import ReleaseManifest, TableInfo

Runs = tuple[tuple[int, int], ...]  # of page numbers, ascending: first and last of each


class TableDamage(msgspec.Struct, frozen=True):
    table: str
    pages: int  # of the table
    lost: Runs = ()
    changed: Runs = ()
    hot: bool = False  # the hot list is not there, or another

    def __str__(self) -> str:
        """item: 3 of 36 pages lost (1, 7-8), 1 changed (12), hot list lost or changed"""
        parts = [
            f"{sum(last - first + 1 for first, last in runs)} of {self.pages} pages {what} ({_shown(runs)})"
            for what, runs in (("lost", self.lost), ("changed", self.changed))
            if runs
        ]
        return f"{self.table}: {', '.join(parts + ['hot list lost or changed'] * self.hot)}"


def check(
    bundle: Path, backend: Backend, *, bytes_per_second: float | None = None, progress: Progress = no_progress
) -> tuple[TableDamage, ...]:
    """Reads every byte of the release back and compares it with the bundle, and that with its manifest's checksums.

    Raises UnknownRelease where the release is not complete, ReleaseConflict where it has other content, InvalidRelease
    for a damaged bundle, StoreUnavailable.
    """
    manifest = read_release_manifest(bundle)
    comparison = _Comparison(bundle, manifest, _stored(manifest, backend), Pace(bytes_per_second), progress)
    found = tuple(damage for table in manifest.tables if (damage := comparison.table(table)))
    _stored(manifest, backend)  # raises where gc has removed it meanwhile: then its pages were not lost
    return found


def mend(
    bundle: Path, backend: Backend, *, bytes_per_second: float | None = None, progress: Progress = no_progress
) -> tuple[TableDamage, ...]:
    """As `check`, and writes what differs again, and reads that back. Returns what was damaged. Killed anywhere, the
    next run goes on. Raises also InvalidRelease where the store does not give back what was written, and StoreNotReady.
    """
    manifest = read_release_manifest(bundle)
    backend.preflight(manifest, room=0)
    with Hold(backend, (manifest.name,)):  # or gc may remove it, and leave us to write pages of nothing
        comparison = _Comparison(bundle, manifest, _stored(manifest, backend), Pace(bytes_per_second), progress)
        found = []
        for table in manifest.tables:
            damage = comparison.table(table)
            if damage is not None:
                comparison.mend(table, damage)
                found.append(damage)
    return tuple(found)


def mend_losses(
    bundle: Path, backend: Backend, *, bytes_per_second: float | None = None, progress: Progress = no_progress
) -> tuple[TableDamage, ...]:
    """Looks only whether every page and hot list is there and has its length; where not, `mend`: the whole release is
    compared, since nobody knows what else has happened to it."""
    manifest = read_release_manifest(bundle)
    pages = _stored(manifest, backend)
    if all(_looks_whole(pages, table) for table in manifest.tables):
        return ()
    return mend(bundle, backend, bytes_per_second=bytes_per_second, progress=progress)


def _looks_whole(pages: PageStore, table: TableInfo) -> bool:
    return len(pages.read_hot(table) or b"") == 8 * table.hot_ids and not pages.lost_pages(table)


def _stored(manifest: ReleaseManifest, backend: Backend) -> PageStore:
    if not backend.contains(manifest):
        raise UnknownRelease(
            f"no release {manifest.name!r} in {backend.address}, or it is not complete: "
            "torchrank publish BUNDLE --store URL"
        )
    return backend.pages(manifest.name)


class _Comparison:
    """Of one bundle with one release."""

    def __init__(
        self, bundle: Path, manifest: ReleaseManifest, pages: PageStore, pace: Pace, progress: Progress
    ) -> None:
        self._folder = bundle / "tables"
        self._pages = pages
        self._pace = pace
        self._progress = progress
        self._done = 0
        self._total = sum(table.bytes + table.ids_bytes for table in manifest.tables)

    def table(self, table: TableInfo) -> TableDamage | None:
        """None where all is as it was written."""
        checksum = Checksum(table)
        found = []
        for chunk in read_chunks(self._folder, table):
            checksum.add(chunk)
            self._pace.wait(chunk.bytes, nothing)
            states = self._pages.compare(table, chunk)
            found += [(chunk.first_page + place, states[place]) for place in np.flatnonzero(states).tolist()]
            self._done += chunk.bytes
            self._progress(f"comparing {table.name}", self._done, self._total)
        if wrong := checksum.wrong_file():
            raise InvalidRelease(f"{self._folder / wrong} does not have the checksum that the manifest states: damaged")
        hot = (self._pages.read_hot(table) or b"") != self._hot(table)
        if not found and not hot:
            return None
        lost, changed = (_runs([page for page, state in found if state == kind]) for kind in (LOST, CHANGED))
        return TableDamage(table.name, table.pages, lost, changed, hot)

    def mend(self, table: TableInfo, damage: TableDamage) -> None:
        """Pages in their order, which files need: see `memmap_pages.py`."""
        runs = sorted(damage.lost + damage.changed)
        for chunk in read_chunks(self._folder, table) if runs else ():
            for first, end in _within(runs, chunk.first_page, chunk.end):
                part = chunk.part(first, end)
                self._pace.wait(2 * part.bytes, nothing)
                self._pages.write(table, part)
                self._pages.verify(table, part)
                self._progress(f"mending {table.name}", self._done, self._total)
        if damage.hot:
            self._mend_hot(table)
        self._pages.sync(table)

    def _mend_hot(self, table: TableInfo) -> None:
        self._pages.write_hot(table, self._hot(table))
        if self._pages.read_hot(table) != self._hot(table):
            raise InvalidRelease(f"{self._pages.address} gives back another hot list of table {table.name!r}")

    def _hot(self, table: TableInfo) -> bytes:
        return read_hot(self._folder, table).astype("<i8").tobytes()


def _runs(pages: list[int]) -> Runs:
    """pages: ascending."""
    numbers: NDArray[np.int64] = np.array(pages, np.int64)
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1).tolist()
    return tuple((pages[start], pages[end - 1]) for start, end in pairwise([*starts, len(pages)]))


def _within(runs: list[tuple[int, int]], first: int, end: int) -> Iterator[tuple[int, int]]:
    """What the pages first … end - 1 have of the runs: the first page of each, and the one after its last."""
    for run_first, run_last in runs:
        if run_first < end and run_last >= first:
            yield max(run_first, first), min(run_last + 1, end)


def _shown(runs: Runs, most: int = 8) -> str:
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs[:most]]
    return ", ".join(shown + ["…"] * (len(runs) > most))
