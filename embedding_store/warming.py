"""Fills the cache with a release's most frequent ids before it gets traffic."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import Backend
from embedding_store.batch import IdBatch
from embedding_store.cache_owners import CachedTables
from embedding_store.hot_cache import HotCache
from embedding_store.release import ReleaseManifest, TableInfo

_log = logging.getLogger(__name__)

_CHUNK = 8192  # ids per fetch


def warm(backend: Backend, cache: HotCache, manifest: ReleaseManifest, cached: CachedTables) -> dict[str, int]:
    """Hottest first and the tables in turn, until the hot lists end or the budget was offered once over.

    A list that was lost costs misses and nothing else: it is logged. Returns the rows fetched per table. Raises
    UnknownRelease, StoreUnavailable, InvalidRelease.
    """
    loaded = dict.fromkeys(manifest.places, 0)
    hot = {table.name: _hot_ids(backend, manifest, table) for table in manifest.tables}
    room = cache.budget
    start = 0
    while room > 0 and any(len(ids) > start for ids in hot.values()):
        for table in manifest.tables:
            chunk = hot[table.name][start : start + _CHUNK]
            if len(chunk) and room > 0:
                _load(backend, cache, manifest, cached, table.name, chunk)
                loaded[table.name] += len(chunk)
                room -= len(chunk) * table.row_bytes
        start += _CHUNK
    return loaded


def _hot_ids(backend: Backend, manifest: ReleaseManifest, table: TableInfo) -> NDArray[np.int64]:
    ids = backend.hot_ids(manifest.name, table.name)
    if table.hot_ids and not len(ids):
        _log.warning(
            "%s has lost the hot list of %s's table %r, of %d ids (evicted or deleted?): its cache starts cold; "
            "`torchrank verify BUNDLE --store URL --mend` writes it again",
            backend.address, manifest.name, table.name, table.hot_ids,
        )  # fmt: skip
    return ids


def _load(
    backend: Backend,
    cache: HotCache,
    manifest: ReleaseManifest,
    cached: CachedTables,
    table: str,
    ids: NDArray[np.int64],
) -> None:
    place = np.array([manifest.places[table]], np.int64)
    batch = IdBatch(place, np.array([len(ids)], np.int64), ids)
    fetched = backend.fetch(manifest.name, batch)
    if fetched.error is not None:
        raise fetched.error
    cache.insert(cached, batch, fetched.rows, fetched.status, warming=True)
