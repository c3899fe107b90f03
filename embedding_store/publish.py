"""From a bundle to a release: write a namespace that nobody reads → read it back → commit.

Killed at any step, this leaves the store's releases and pointers as they were; the next run of the same bundle goes on
behind the part that was verified.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from embedding_store.backend import Backend, ReleaseWriter, Verified
from embedding_store.bundle import read_chunks, read_release_manifest
from embedding_store.chunks import Checksum, Chunk
from embedding_store.errors import InvalidRelease, ReleaseConflict, StoreUnavailable
from embedding_store.mend import TableDamage, mend_losses
from embedding_store.pace import Pace
from embedding_store.pages import read_hot
from embedding_store.progress import Progress, no_progress
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.releases import activate

# Between two marks: what an interrupted publication has to do again at most. A mark may cost a sync of the disk.
_MARKED_BYTES = 64 << 20


class Published(NamedTuple):
    manifest: ReleaseManifest
    new: bool  # it was not complete before
    mended: tuple[TableDamage, ...] = ()


def publish(
    bundle: Path, backend: Backend, *, bytes_per_second: float | None = None, progress: Progress = no_progress
) -> Published:
    """Copies the tables of `bundle` into the store as a complete release, not yet active. Where it is there already,
    looks whether its pages are, and mends it where not: `mend_losses`.

    `bytes_per_second`: at most that much is written, and as much read back, together. Raises InvalidRelease (a damaged
    bundle, or a store that does not give back what was written), ReleaseConflict (the store has a release of this name
    with other content, or another publisher is at it), StoreNotReady (what to set), StoreUnavailable.
    """
    manifest = read_release_manifest(bundle)
    backend.create()
    if backend.contains(manifest):
        mended = mend_losses(bundle, backend, bytes_per_second=bytes_per_second, progress=progress)
        return Published(manifest, new=False, mended=mended)
    backend.preflight(manifest)
    with backend.writer(manifest) as writer:
        publication = _Publication(bundle / "tables", writer, backend.address, Pace(bytes_per_second))
        total = 2 * sum(table.bytes + table.ids_bytes for table in manifest.tables)
        done = 0
        for table in manifest.tables:
            for step, size in publication.table(table):
                progress(f"{step} {table.name}", done + size, total)
            done += 2 * (table.bytes + table.ids_bytes)
            progress(f"verified {table.name}", done, total)
        publication.check_pages(manifest)
        writer.commit()
    return Published(manifest, new=True)


def publish_and_activate(
    bundle: Path, backend: Backend, *, bytes_per_second: float | None = None, progress: Progress = no_progress
) -> tuple[Published, str | None]:
    """As `publish`, then makes it the active release, unless the pointer moved since this began: then ReleaseConflict,
    and the release is complete but not active. Returns also the release that was active before."""
    backend.create()
    expected = backend.history(read_release_manifest(bundle).model)
    published = publish(bundle, backend, bytes_per_second=bytes_per_second, progress=progress)
    try:
        return published, activate(backend, published.manifest.name, expected)
    except ReleaseConflict as error:
        raise ReleaseConflict(f"{error}; {published.manifest.name} is published, but not active") from error


class _Publication:
    """Of one release."""

    def __init__(self, folder: Path, writer: ReleaseWriter, address: str, pace: Pace) -> None:
        self._folder = folder
        self._writer = writer
        self._address = address
        self._pace = pace
        self._verified = writer.verified()

    def table(self, table: TableInfo) -> Iterator[tuple[str, int]]:
        """Yields what it does, and the bytes that it has written and verified so far."""
        before = self._verified.get(table.name, Verified(0, ""))
        if before.pages == table.pages:
            return
        if not (yield from self._go_on(table, before)):
            yield from self._go_on(table, Verified(0, ""))

    def _go_on(self, table: TableInfo, before: Verified) -> Generator[tuple[str, int], None, bool]:
        """As `table`, behind the part that was verified `before`; False where the bundle's files were others then."""
        checksum = Checksum(table)
        done = unmarked = 0
        unchanged = before.pages == 0
        for chunk in read_chunks(self._folder, table):
            checksum.add(chunk)
            if chunk.end <= before.pages:
                unchanged = chunk.end == before.pages and checksum.digest() == before.digest
                done += 2 * chunk.bytes
                self._writer.renew()
                yield "skipping", done
                continue
            if not unchanged:
                return False
            for step in self._copy(table, chunk):
                done += chunk.bytes
                yield step, done
            unmarked += chunk.bytes
            if unmarked >= _MARKED_BYTES and chunk.end < table.pages:
                self._writer.mark_verified(table, Verified(chunk.end, checksum.digest()))
                unmarked = 0
        if wrong := checksum.wrong_file():
            raise InvalidRelease(f"{self._folder / wrong} does not have the checksum that the manifest states: damaged")
        self._copy_hot(table)
        self._writer.mark_verified(table, Verified(table.pages, checksum.digest()))
        return True

    def _copy(self, table: TableInfo, chunk: Chunk) -> Iterator[str]:
        self._pace.wait(chunk.bytes, self._writer.renew)
        self._writer.renew()
        self._writer.write(table, chunk)
        yield "writing"
        self._pace.wait(chunk.bytes, self._writer.renew)
        self._writer.verify(table, chunk)
        yield "verifying"

    def _copy_hot(self, table: TableInfo) -> None:
        hot = read_hot(self._folder, table).astype("<i8").tobytes()
        if not hot:
            return
        self._writer.write_hot(table, hot)
        if self._writer.read_hot(table) != hot:
            raise InvalidRelease(
                f"{self._address} gives back another hot list of table {table.name!r}; the release is not published"
            )

    def check_pages(self, manifest: ReleaseManifest) -> None:
        """What was verified an hour ago may have been lost since, by a fail-over or a restart."""
        for table in manifest.tables:
            lost = self._writer.lost_pages(table, self._writer.renew)
            if lost:
                self._writer.mark_verified(table, Verified(0, ""))
                raise StoreUnavailable(
                    f"{self._address} has lost {lost} of {table.pages} pages of table {table.name!r} since they were "
                    f"written (restarted, failed over, or evicted?); {manifest.name} is not published: publish it again"
                )
