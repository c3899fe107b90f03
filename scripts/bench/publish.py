"""Publishing a bundle, written, read back and compared, beside one key per row; and removing it again.

    python scripts/bench/publish.py [--gigabytes 1] [--rows-of-peer 200000] [--json]

Tables of random fp16 rows of 128 bytes go to a redis-server of the benchmark's own, over a unix socket, and into a
directory. The peer is what one writes without this package: redis-py's pipeline of SET `TABLE:ID`, a thousand at a
time, of which nothing is read back; it gets the first rows only, and is compared by bytes a second. A ratio above 1
means that ours is faster.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import redis
from rich.console import Console
from rich.table import Table

from embedding_store.codec import page_rows
from embedding_store.gc import collect
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.release import CHECK_BYTES, ReleaseManifest, TableInfo
from scripts.bench.redis_server import redis_server

DIM, WIDTH = 64, 128  # fp16
STORED = WIDTH + CHECK_BYTES
TABLES = 4
_CHUNK = 100_000  # rows


def write_bundle(folder: Path, total_bytes: float) -> ReleaseManifest:
    rng = np.random.default_rng(0)
    rows = max(1, round(total_bytes / TABLES / STORED))
    (folder / "tables").mkdir(parents=True)
    tables = []
    for number in range(TABLES):
        digest = hashlib.sha256()
        with (folder / "tables" / f"table_{number}.pages").open("wb") as file:
            for start in range(0, rows, _CHUNK):
                content = rng.bytes(min(_CHUNK, rows - start) * STORED)  # nobody reads rows: no checks that are right
                digest.update(content)
                file.write(content)
        tables.append(TableInfo(f"table_{number}", rows, DIM, "fp16", WIDTH, page_rows(WIDTH), digest.hexdigest()))
    manifest = ReleaseManifest("bench", "1", "2026-01-01T00:00:00Z", tuple(tables))
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return manifest


def write_row_keys(client: redis.Redis, path: Path, rows: int) -> None:
    content = np.fromfile(path, np.uint8, rows * WIDTH).tobytes()
    for start in range(0, rows, 1000):
        with client.pipeline(transaction=False) as pipeline:
            for row in range(start, min(start + 1000, rows)):
                pipeline.set(f"table_0:{row}", content[row * WIDTH : (row + 1) * WIDTH])
            pipeline.execute()


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, redis_server(Path(name)) as socket:
        bundle = Path(name) / "bundle"
        manifest = write_bundle(bundle, options.gigabytes * 1e9)
        size = sum(table.bytes for table in manifest.tables)
        figures = {"bytes": float(size)}
        for kind, url in (("redis", f"redis+unix://{socket}"), ("memmap", f"memmap://{name}/store")):
            with open_backend(url) as backend:
                figures[f"{kind}.publish_s"] = seconds(lambda backend=backend: publish(bundle, backend))
                figures[f"{kind}.gc_s"] = seconds(lambda backend=backend: collect(backend, grace=0))
                figures[f"{kind}.publish_MB_per_s"] = size / 1e6 / figures[f"{kind}.publish_s"]
        peer_rows = min(options.rows_of_peer, manifest.tables[0].rows)
        with redis.Redis(unix_socket_path=str(socket), db=1) as client:
            taken = seconds(lambda: write_row_keys(client, bundle / "tables" / "table_0.pages", peer_rows))
        figures["row_keys_MB_per_s"] = peer_rows * WIDTH / 1e6 / taken
        figures["publish_vs_row_keys"] = figures["redis.publish_MB_per_s"] / figures["row_keys_MB_per_s"]
        return figures


def show(figures: dict[str, float]) -> None:
    table = Table("to", "published in", "MB/s", "removed in", title=f"{figures['bytes'] / 1e9:.2f} GB of rows")
    for kind in ("redis", "memmap"):
        publish_s, rate, gc_s = (figures[f"{kind}.{key}"] for key in ("publish_s", "publish_MB_per_s", "gc_s"))
        table.add_row(kind, f"{publish_s:.1f} s", f"{rate:.0f}", f"{gc_s:.1f} s")
    table.add_row("redis, a key per row", "", f"{figures['row_keys_MB_per_s']:.1f}", "")
    Console().print(table)
    print(f"pages, read back, beside row keys, not read back: {figures['publish_vs_row_keys']:.1f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rows-of-peer", type=int, default=200_000)
    parser.add_argument("--json", action="store_true", help="one JSON object after the table")
    options = parser.parse_args()
    figures = run(options)
    show(figures)
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
