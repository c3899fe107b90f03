"""A bundle's tables, as far as a store takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from embedding_store.chunks import Chunk
from embedding_store.codec import check_name, check_table
from embedding_store.errors import InvalidRelease
from embedding_store.pages import page_chunks
from embedding_store.release import ReleaseManifest, TableInfo, decode_manifest
from embedding_store.sparse_pages import bucket_chunks

_CHUNK_BYTES = 1 << 20  # a few chunks are in memory at a time, on both sides


def read_release_manifest(bundle: Path) -> ReleaseManifest:
    """The part of BUNDLE/manifest.json that a store keeps. Raises InvalidRelease."""
    path = bundle / "manifest.json"
    try:
        manifest = decode_manifest(path.read_bytes())
    except OSError as error:
        raise InvalidRelease(f"{bundle} is not a bundle: {path.name}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InvalidRelease(f"{path}: {error}") from error
    if not manifest.is_current:
        raise InvalidRelease(f"{path}: exported by an older torchrank: export and publish it again")
    check_name("model", manifest.model)
    check_name("version", manifest.version)
    for table in manifest.tables:
        check_table(table)
    names = [table.name for table in manifest.tables]
    if len(set(names)) != len(names):
        raise InvalidRelease(f"{path}: a table name occurs twice among {', '.join(sorted(names))}")
    return manifest


def read_chunks(folder: Path, table: TableInfo) -> Iterator[Chunk]:
    """All of a table out of FOLDER/NAME.pages and NAME.ids, in order. Raises InvalidRelease."""
    pages_at_once = max(1, _CHUNK_BYTES // (table.page_rows * table.stored_bytes))
    return (bucket_chunks if table.sparse else page_chunks)(folder, table, pages_at_once)
