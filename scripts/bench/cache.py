"""Hits of the hot-id cache beside np.take on a plain array and an OrderedDict, and the way through a whole store.

    python scripts/bench/cache.py [--repeat 200] [--redis redis+unix:///path/to/socket] [--json]

Hits: 10,000 distinct ids of 64-byte rows out of 100,000 cached ones. The plain array knows no absent ids, no bound and
no eviction: it is the floor. Dedupe: 500 ids, half of them twice. Look-up: 6,000 ids over 12 tables of 100,000 fp16
rows of 32 bytes, about 95 % of them in the cache. Ratios above 1 mean that ours is faster. One thread; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from embedding_store.cache import TableCache, full_bytes
from embedding_store.dedupe import dedupe
from embedding_store.open import open_store
from embedding_store.pages import PageWriter
from embedding_store.publish import publish
from embedding_store.release import ReleaseManifest, TableInfo

ROWS, ASKED, WIDTH = 100_000, 10_000, 64
TABLES, PER_TABLE, HOT = 12, 500, 10_000


def median_us(call: Callable[[], object], repeat: int) -> float:
    call()  # compiles
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure_hits(repeat: int, rng: np.random.Generator) -> dict[str, float]:
    table = TableInfo(name="t", rows=ROWS, dim=16, codec="fp32", row_bytes=WIDTH, page_rows=127, sha256="")
    data = rng.integers(0, 256, (ROWS, WIDTH)).astype(np.uint8)
    cache = TableCache(table, full_bytes(table))
    everything = np.arange(ROWS)
    cache.insert(everything, data, np.ones(ROWS, np.bool_))
    ordered = OrderedDict((row, data[row].tobytes()) for row in range(ROWS))
    ids = rng.permutation(ROWS)[:ASKED]
    listed = ids.tolist()
    rows, status = np.empty((ASKED, WIDTH), np.uint8), np.empty(ASKED, np.uint8)

    def from_ordered() -> NDArray[np.uint8]:
        found = []
        for row in listed:
            ordered.move_to_end(row)
            found.append(ordered[row])
        return np.frombuffer(b"".join(found), np.uint8)

    return {
        "hits_us.cache": median_us(lambda: cache.probe(ids, rows, status), repeat),
        "hits_us.np_take": median_us(lambda: np.take(data, ids, axis=0, out=rows), repeat),
        "hits_us.ordered_dict": median_us(from_ordered, max(3, repeat // 10)),
    }


def measure_dedupe(repeat: int, rng: np.random.Generator) -> dict[str, float]:
    ids = rng.permutation(np.repeat(rng.integers(0, 1 << 40, PER_TABLE // 2), 2))
    return {
        "dedupe_us.hash": median_us(lambda: dedupe(ids), repeat),
        "dedupe_us.np_unique": median_us(lambda: np.unique(ids, return_inverse=True), repeat),
    }


def write_bundle(folder: Path, rng: np.random.Generator) -> ReleaseManifest:
    (folder / "tables").mkdir(parents=True)
    tables = []
    for number in range(TABLES):
        with PageWriter(folder / "tables", f"t{number}", "fp16", 16) as writer:
            writer.append(rng.standard_normal((ROWS, 16)).astype(np.float32))
            tables.append(writer.finish(hot_ids=np.arange(HOT)))
    manifest = ReleaseManifest("bench", "1", "2026-01-01T00:00:00Z", tuple(tables))
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return manifest


def measure_lookups(
    url: str, bundle: Path, cache_bytes: int, repeat: int, rng: np.random.Generator
) -> dict[str, float]:
    def request() -> dict[str, NDArray[np.int64]]:
        hot = rng.random((TABLES, PER_TABLE)) < 0.95
        ids = np.where(hot, rng.integers(0, HOT, hot.shape), rng.integers(HOT, ROWS, hot.shape))
        return {f"t{number}": ids[number] for number in range(TABLES)}

    with open_store(url, cache_bytes=cache_bytes) as store:
        release = publish(bundle, store.backend).name
        store.warm(release)
        requests = iter([request() for _ in range(repeat + 20)])
        for _ in range(19):
            store.lookup(release, next(requests))
        kind = f"{url.partition(':')[0]}.{'cache' if cache_bytes else 'no_cache'}"
        elapsed = median_us(lambda: store.lookup(release, next(requests)), repeat)
        return {f"lookup_us.{kind}": elapsed, f"hit_rate.{kind}": store.stats().hit_rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--redis", metavar="URL", help="measure look-ups there too; its release bench@1 stays")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    figures = measure_hits(options.repeat, rng) | measure_dedupe(options.repeat, rng)
    figures |= {
        "ratio.np_take": figures["hits_us.np_take"] / figures["hits_us.cache"],
        "ratio.ordered_dict": figures["hits_us.ordered_dict"] / figures["hits_us.cache"],
        "ratio.np_unique": figures["dedupe_us.np_unique"] / figures["dedupe_us.hash"],
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, rng)
        cache_bytes = TABLES * 2 * HOT * (32 + 12)
        for url in (f"memmap://{folder}/store", *([options.redis] if options.redis else [])):
            for size in (0, cache_bytes):
                figures |= measure_lookups(url, bundle, size, options.repeat, rng)

    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    Console().print(table)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
