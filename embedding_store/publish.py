"""From a bundle to a release: write a namespace that nobody reads → read it back → commit.

Killed at any step, this leaves the store's releases and pointers as they were; the next run of the same bundle goes on
after the last table that was verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from embedding_store.backend import Backend, ReleaseWriter
from embedding_store.codec import check_name, check_table
from embedding_store.errors import InvalidRelease
from embedding_store.pages import read_hot
from embedding_store.release import ReleaseManifest, TableInfo

_CHUNK_BYTES = 1 << 20


class Progress(Protocol):
    def __call__(self, step: str, done: int, total: int) -> None:
        """`step` says what is going on; done and total are bytes: written ones and verified ones, of all tables."""


def no_progress(step: str, done: int, total: int) -> None:
    pass


def read_release_manifest(bundle: Path) -> ReleaseManifest:
    """The part of BUNDLE/manifest.json that a store keeps. Raises InvalidRelease."""
    path = bundle / "manifest.json"
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=ReleaseManifest)
    except OSError as error:
        raise InvalidRelease(f"{bundle} is not a bundle: {path.name}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InvalidRelease(f"{path}: {error}") from error
    check_name("model", manifest.model)
    check_name("version", manifest.version)
    for table in manifest.tables:
        check_table(table)
    names = [table.name for table in manifest.tables]
    if len(set(names)) != len(names):
        raise InvalidRelease(f"{path}: a table name occurs twice among {', '.join(sorted(names))}")
    return manifest


def publish(bundle: Path, backend: Backend, *, progress: Progress = no_progress) -> ReleaseManifest:
    """Copies the tables of `bundle` into the store as a complete release, not yet active; nothing where it is there.

    Raises InvalidRelease (a damaged bundle, or a store that does not give back what was written), ReleaseConflict (the
    store has a release of this name with other content), StoreUnavailable.
    """
    manifest = read_release_manifest(bundle)
    if backend.contains(manifest):
        return manifest
    with backend.writer(manifest) as writer:
        verified = writer.verified()
        total = 2 * sum(table.bytes for table in manifest.tables)
        done = 0
        for table in manifest.tables:
            if table.name not in verified:
                for step, size in _publish_table(bundle / "tables", table, writer, backend.address):
                    progress(f"{step} {table.name}", done + size, total)
                writer.mark_verified(table)
            done += 2 * table.bytes
            progress(f"verified {table.name}", done, total)
        writer.commit()
    return manifest


def _publish_table(folder: Path, table: TableInfo, writer: ReleaseWriter, address: str) -> Iterator[tuple[str, int]]:
    """Yields what it does and the bytes that it has written and verified so far."""
    written = hashlib.sha256()
    chunk_pages = max(1, _CHUNK_BYTES // (table.page_rows * table.row_bytes))
    for first_page, data in _chunks(folder / f"{table.name}.pages", table, chunk_pages):
        written.update(data)
        writer.write(table, first_page, data)
        yield "writing", first_page * table.page_rows * table.row_bytes + len(data)
    if written.hexdigest() != table.sha256:
        raise InvalidRelease(
            f"{folder / table.name}.pages does not have the checksum that the manifest states: damaged"
        )
    hot = read_hot(folder, table).astype("<i8").tobytes()
    if hot:
        writer.write_hot(table, hot)

    stored = hashlib.sha256()
    size = 0
    for first_page in range(0, table.pages, chunk_pages):
        content = writer.read(table, first_page, min(chunk_pages, table.pages - first_page))
        stored.update(content)
        size += len(content)
        yield "verifying", table.bytes + size
    if size != table.bytes or stored.hexdigest() != table.sha256:
        raise InvalidRelease(
            f"{address} gives back {size} bytes of table {table.name!r}, not the {table.bytes} that were written, or "
            "others; the release is not published"
        )
    if hot and writer.read_hot(table) != hot:
        raise InvalidRelease(
            f"{address} gives back another hot list of table {table.name!r}; the release is not published"
        )


def _chunks(path: Path, table: TableInfo, chunk_pages: int) -> Iterator[tuple[int, memoryview]]:
    """(first page, whole pages) of a pages file; the views share one buffer."""
    buffer = memoryview(bytearray(chunk_pages * table.page_rows * table.row_bytes))
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size != table.bytes:
                raise InvalidRelease(
                    f"{path} has {size} bytes; {table.rows} rows of {table.row_bytes} take {table.bytes}"
                )
            for first_page in range(0, table.pages, chunk_pages):
                yield first_page, buffer[: file.readinto(buffer)]
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise  # of the store, thrown in at the yield
        raise InvalidRelease(f"cannot read {path}: {error.strerror}") from error
