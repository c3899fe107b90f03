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
import numpy as np

from embedding_store.backend import Backend, ReleaseWriter
from embedding_store.codec import check_name, check_table
from embedding_store.errors import InvalidRelease
from embedding_store.pages import open_pages, read_hot
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.sparse_pages import BucketRun, bucket_runs

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
        total = 2 * sum(table.bytes + table.ids_bytes for table in manifest.tables)
        done = 0
        for table in manifest.tables:
            if table.name not in verified:
                for step, size in _publish_table(bundle / "tables", table, writer, backend.address):
                    progress(f"{step} {table.name}", done + size, total)
                writer.mark_verified(table)
            done += 2 * (table.bytes + table.ids_bytes)
            progress(f"verified {table.name}", done, total)
        writer.commit()
    return manifest


def _publish_table(folder: Path, table: TableInfo, writer: ReleaseWriter, address: str) -> Iterator[tuple[str, int]]:
    """Yields what it does and the bytes that it has written and verified so far."""
    write, verify = (_write_buckets, _verify_buckets) if table.sparse else (_write_pages, _verify_pages)
    for size in write(folder, table, writer):
        yield "writing", size
    hot = read_hot(folder, table).astype("<i8").tobytes()
    if hot:
        writer.write_hot(table, hot)
    try:
        for size in verify(folder, table, writer):
            yield "verifying", table.bytes + table.ids_bytes + size
    except _NotGivenBackError as error:
        raise InvalidRelease(f"{address} gives back {error}; the release is not published") from error
    if hot and writer.read_hot(table) != hot:
        raise InvalidRelease(
            f"{address} gives back another hot list of table {table.name!r}; the release is not published"
        )


class _NotGivenBackError(Exception):
    pass


def _write_pages(folder: Path, table: TableInfo, writer: ReleaseWriter) -> Iterator[int]:
    written = hashlib.sha256()
    page_bytes = table.page_rows * table.row_bytes
    at_once = _at_once(table)
    buffer = memoryview(bytearray(at_once * page_bytes))
    with open_pages(folder, table) as file:
        for first_page in range(0, table.pages, at_once):
            data = buffer[: file.readinto(buffer)]
            written.update(data)
            writer.write(table, first_page, data)
            yield first_page * page_bytes + len(data)
    _check_sum(folder / f"{table.name}.pages", written.hexdigest(), table.sha256)


def _verify_pages(folder: Path, table: TableInfo, writer: ReleaseWriter) -> Iterator[int]:
    stored = hashlib.sha256()
    size = 0
    at_once = _at_once(table)
    for first_page in range(0, table.pages, at_once):
        content = writer.read(table, first_page, min(at_once, table.pages - first_page))
        stored.update(content)
        size += len(content)
        yield size
    if size != table.bytes or stored.hexdigest() != table.sha256:
        raise _NotGivenBackError(
            f"{size} bytes of table {table.name!r}, not the {table.bytes} that were written, or others"
        )


def _write_buckets(folder: Path, table: TableInfo, writer: ReleaseWriter) -> Iterator[int]:
    rows_sum, ids_sum = hashlib.sha256(), hashlib.sha256()
    for run in bucket_runs(folder, table, _at_once(table)):
        rows_sum.update(run.rows.data)
        ids_sum.update(run.ids.data)
        writer.write_buckets(table, run)
        yield _end(table, run)
    _check_sum(folder / f"{table.name}.pages", rows_sum.hexdigest(), table.sha256)
    _check_sum(folder / f"{table.name}.ids", ids_sum.hexdigest(), table.ids_sha256)


def _verify_buckets(folder: Path, table: TableInfo, writer: ReleaseWriter) -> Iterator[int]:
    for run in bucket_runs(folder, table, _at_once(table)):
        try:
            ids, rows = writer.read_buckets(table, run)
        except InvalidRelease as error:
            raise _NotGivenBackError(f"table {table.name!r} damaged: {error}") from error
        if not (np.array_equal(ids, run.ids) and np.array_equal(rows, run.rows)):
            raise _NotGivenBackError(f"other rows of table {table.name!r} than were written")
        yield _end(table, run)


def _end(table: TableInfo, run: BucketRun) -> int:
    """Bytes of the table's files up to the end of this run."""
    return (run.first_row + len(run.ids)) * (table.bytes + table.ids_bytes) // table.rows


def _at_once(table: TableInfo) -> int:
    """Pages or buckets that are written and read with one call."""
    return max(1, _CHUNK_BYTES // (table.page_rows * table.row_bytes))


def _check_sum(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise InvalidRelease(f"{path} does not have the checksum that the manifest states: damaged")
