"""The hot-id cache beside np.take and an OrderedDict, its hit rates beside LRU's, and the way through a whole store.

    python scripts/bench/cache.py [--repeat 200] [--redis redis+unix:///path/to/socket] [--json]

Hits: 10,000 distinct ids of 64-byte rows out of 100,000 cached ones, each time others. The plain array knows no absent
ids, no bound and no eviction: it is the floor. The OrderedDict is an LRU as one would write it, rows as arrays, copied
into the output; `ordered_dict_join` is the same with rows as bytes, joined. Look-up: 2,000 ids over 20 tables of
32-byte rows, 95 % of them in the cache, in one call.

Threads: look-ups of 10,000 hits, and of 2,000 ids of which 5 % miss and are inserted, by two threads at once and by
one.

Hit rates, of raw ids, duplicates and all: `cache_traffic.py` says what moves. Zipf 0.8 over 1 M ids with 10,000
entries; Zipf 1.05 over 100,000 ids with 1,000 entries, where every 40,000 requests all ranks go to other ids
(zipf105_moving) or the hottest 100 (zipf105_top100); and all of 1 M ids with 10,000 entries (zipf105_early), before any
cache can have learnt much. `lru` is our other policy, `exact_lru` one list over all entries, `ideal` a cache of the
most frequent ids.

Dedupe: 500 ids, half of them twice. Store: 6,000 ids over 12 tables of 100,000 fp16 rows of 32 bytes, about 95 % of
them in the cache. Ratios above 1 mean that ours is faster. One thread unless said; medians, in turns with the peers.
"""

from __future__ import annotations

import argparse
import itertools
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

from embedding_store.batch import IdBatch
from embedding_store.dedupe import dedupe
from embedding_store.hot_cache import HotCache
from embedding_store.lookup import FOUND
from embedding_store.open import open_store
from embedding_store.pages import PageWriter
from embedding_store.publish import publish
from embedding_store.release import ReleaseManifest, TableInfo
from scripts.bench.cache_threads import measure_threads
from scripts.bench.cache_traffic import exact_lru, hit_rate, moving, ranks, static_top

ROWS, ASKED, WIDTH = 100_000, 10_000, 64
TABLES, PER_TABLE, HOT = 12, 500, 10_000

Figures = dict[str, float]


def medians_us(calls: dict[str, Callable[[], object]], repeat: int) -> Figures:
    """In turns, so that whatever else the machine does meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat + 1):  # the first one compiles
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) * 1e6 for name, times in seconds.items()}


class OrderedDictCache:
    """The LRU that a Python program would have."""

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        self._rows = OrderedDict(enumerate(rows))

    def probe(self, ids: NDArray[np.int64], out: NDArray[np.uint8]) -> list[int]:
        misses = []
        for position, key in enumerate(ids.tolist()):
            row = self._rows.get(key)
            if row is None:
                misses.append(position)
            else:
                self._rows.move_to_end(key)
                out[position] = row
        return misses


def measure_hits(repeat: int, rng: np.random.Generator) -> Figures:
    table = TableInfo(name="t", rows=ROWS, dim=16, codec="fp32", row_bytes=WIDTH, page_rows=127, sha256="")
    data = rng.integers(0, 256, (ROWS, WIDTH)).astype(np.uint8)
    cache = HotCache(2 * data.nbytes)
    tables = cache.tables(ReleaseManifest("bench", "1", "2026-01-01T00:00:00Z", (table,)))
    place, starts = np.zeros(1, np.int64), np.zeros(1, np.int64)
    everything = IdBatch(place, np.array([ROWS]), np.arange(ROWS))
    cache.insert(tables, everything, data.reshape(-1), np.full(ROWS, FOUND, np.uint8))
    ordered, joined = OrderedDictCache(data), OrderedDict((row, data[row].tobytes()) for row in range(ROWS))
    rows, status = np.empty((ASKED, WIDTH), np.uint8), np.empty(ASKED, np.uint8)
    asked = itertools.cycle([rng.permutation(ROWS)[:ASKED] for _ in range(50)])
    counts = np.array([ASKED])

    def from_joined() -> None:
        found = []
        for key in next(asked).tolist():
            joined.move_to_end(key)
            found.append(joined[key])
        rows.reshape(-1)[:] = np.frombuffer(b"".join(found), np.uint8)

    figures = medians_us(
        {
            "hits_us.cache": lambda: cache.probe(
                tables, IdBatch(place, counts, next(asked)), rows.reshape(-1), starts, status
            ),
            "hits_us.np_take": lambda: np.take(data, next(asked), axis=0, out=rows),
        },
        repeat,
    )
    figures |= medians_us(
        {"hits_us.ordered_dict": lambda: ordered.probe(next(asked), rows), "hits_us.ordered_dict_join": from_joined},
        max(3, repeat // 10),
    )
    return figures | {
        "hits_vs_take": figures["hits_us.np_take"] / figures["hits_us.cache"],
        "hits_vs_ordereddict": figures["hits_us.ordered_dict"] / figures["hits_us.cache"],
        "hits_vs_ordereddict_join": figures["hits_us.ordered_dict_join"] / figures["hits_us.cache"],
    }


def measure_hit_rates(rng: np.random.Generator) -> Figures:
    million, thousands = 1_000_000, 100_000
    traffic = {
        "zipf08_1pct": (rng.permutation(million)[ranks(rng, million, 0.8, 4_000_000)], 10_000, 2000),
        "zipf105_moving": (moving(rng, thousands, 2_000_000, hottest=thousands), 1000, 100),
        "zipf105_top100": (moving(rng, thousands, 2_000_000, hottest=100), 1000, 100),
        "zipf105_early": (moving(rng, million, 2_000_000, hottest=million), 10_000, 100),
    }
    figures: Figures = {}
    for name, (ids, entries, batch) in traffic.items():
        figures[f"hit_rate.{name}"] = hit_rate("s3fifo", ids, entries, batch=batch)
        figures[f"hit_rate.{name}.lru"] = hit_rate("lru", ids, entries, batch=batch)
        figures[f"hit_rate.{name}.exact_lru"] = exact_lru(ids, entries)
    return figures | {"hit_rate.zipf08_1pct.ideal": static_top(million, 0.8, 10_000)}


def measure_dedupe(repeat: int, rng: np.random.Generator) -> Figures:
    ids = rng.permutation(np.repeat(rng.integers(0, 1 << 40, PER_TABLE // 2), 2))
    figures = medians_us(
        {"dedupe_us.hash": lambda: dedupe(ids), "dedupe_us.np_unique": lambda: np.unique(ids, return_inverse=True)},
        repeat,
    )
    return figures | {"dedupe_vs_np_unique": figures["dedupe_us.np_unique"] / figures["dedupe_us.hash"]}


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


def measure_store(url: str, bundle: Path, cache_bytes: int, repeat: int, rng: np.random.Generator) -> Figures:
    def request() -> dict[str, NDArray[np.int64]]:
        hot = rng.random((TABLES, PER_TABLE)) < 0.95
        ids = np.where(hot, rng.integers(0, HOT, hot.shape), rng.integers(HOT, ROWS, hot.shape))
        return {f"t{number}": ids[number] for number in range(TABLES)}

    with open_store(url, cache_bytes=cache_bytes) as store:
        release = publish(bundle, store.backend).manifest.name
        store.warm(release)
        requests = iter([request() for _ in range(repeat + 20)])
        for _ in range(19):
            store.lookup(release, next(requests))
        kind = f"{url.partition(':')[0]}.{'cache' if cache_bytes else 'no_cache'}"
        elapsed = medians_us({f"store_us.{kind}": lambda: store.lookup(release, next(requests))}, repeat)
        return elapsed | {f"store_hit_rate.{kind}": store.stats().hit_rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--redis", metavar="URL", help="measure look-ups there too; its release bench@1 stays")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    figures = measure_hits(options.repeat, rng) | measure_threads(options.repeat, rng) | measure_hit_rates(rng)
    figures |= measure_dedupe(options.repeat, rng)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, rng)
        for url in (f"memmap://{folder}/store", *([options.redis] if options.redis else [])):
            for size in (0, TABLES * 2 * HOT * (32 + 16)):
                figures |= measure_store(url, bundle, size, options.repeat, rng)

    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3f}")
    Console().print(table)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
