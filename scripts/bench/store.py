"""Rows fetched out of Redis beside redis-py with hiredis, and the memory that they take there.

    python scripts/bench/store.py [--rows 1000000] [--blocks 20] [--json]

Random rows of 128 bytes, 1,024 and 10,000 distinct ids at a time, over a unix socket to a redis-server of the
benchmark's own, in turns: this store's fetch; `mget`, one key per row (`item:ID`, in a database of its own); and
redis-py's pipeline of GETRANGE on this store's pages. Each goes from an array of ids to an array of rows. The server's
CPU time is what its INFO says of its main thread. Memory is `used_memory` before and after publishing, per byte of the
rows; sparse: of a table of raw 64-bit ids, which are kept too. Ratios of speed above 1 mean that ours is faster; those
without a number of ids are the worse of both. One thread; medians over blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import redis
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from embedding_store.backend import Backend, namespace
from embedding_store.batch import IdBatch
from embedding_store.open import open_backend
from embedding_store.pages import PageWriter
from embedding_store.publish import publish
from embedding_store.redis_keys import page_key
from embedding_store.release import ReleaseManifest
from embedding_store.sparse_pages import SparsePageWriter
from scripts.bench.redis_server import redis_server

# Bytes of a row, by the name of what is measured.
WIDTHS = {"32": 32, "64": 64, "128": 128, "256": 256, "sparse_128": 128}
FETCHED = "128"
BATCHES = {1024: 60, 10_000: 6}  # ids of a fetch: fetches of a block
_CHUNK = 50_000  # rows

Fetch = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


def write_bundle(folder: Path, rows: int, kind: str) -> ReleaseManifest:
    """One table; the ids of a sparse one are any 64 bits."""
    width = WIDTHS[kind]
    rng = np.random.default_rng(width)
    (folder / "tables").mkdir(parents=True)
    open_writer = SparsePageWriter if kind.startswith("sparse") else PageWriter
    with open_writer(folder / "tables", "item", "fp32", width // 4) as writer:
        for start in range(0, rows, _CHUNK):
            values = rng.random((min(_CHUNK, rows - start), width // 4), np.float32)
            if isinstance(writer, SparsePageWriter):
                writer.append(rng.integers(-(2**63), 2**63, len(values), np.int64), values)
            else:
                writer.append(values)
        manifest = ReleaseManifest("bench", kind, "2026-01-01T00:00:00Z", (writer.finish(),))
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return manifest


def measure_memory(client: redis.Redis, backend: Backend, bundle: Path, payload: int) -> float:
    """Bytes that publishing takes, per byte of `payload`."""
    before = used_memory(client)
    publish(bundle, backend)
    return (used_memory(client) - before) / payload


def used_memory(client: redis.Redis) -> int:
    """When the buffers of connections have shrunk."""
    time.sleep(0.5)
    return int(cast(dict[str, Any], client.info("memory"))["used_memory"])


class Sides:
    """The three ways from ids int64 [n] to rows uint8 [n, width], over one server."""

    def __init__(self, backend: Backend, manifest: ReleaseManifest, socket: Path, pages: Path) -> None:
        self._backend, self._manifest, self._table = backend, manifest, manifest.tables[0]
        self._prefix = page_key("torchrank", namespace(manifest), self._table.name, "").encode()
        self._client = redis.Redis(unix_socket_path=str(socket), protocol=2)
        self._keyed = redis.Redis(unix_socket_path=str(socket), protocol=2, db=1)
        stored = np.fromfile(pages, np.uint8).reshape(-1, self._table.stored_bytes)
        self.rows = np.ascontiguousarray(stored[:, : self._table.row_bytes])  # without their checks
        for start in range(0, len(self.rows), _CHUNK):
            part = self.rows[start : start + _CHUNK]
            self._keyed.mset({f"item:{start + i}": row.tobytes() for i, row in enumerate(part)})

    def all(self) -> dict[str, Fetch]:
        return {"fetch": self.fetch, "mget": self.mget, "pipeline": self.pipeline}

    def fetch(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        batch = IdBatch(np.zeros(1, np.int64), np.array([len(ids)]), ids)
        fetched = self._backend.fetch(self._manifest.name, batch, timeout=60)
        if fetched.error is not None:
            raise fetched.error
        return fetched.rows.reshape(len(ids), -1)

    def mget(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        replies = cast(list[bytes], self._keyed.mget([b"item:%d" % row for row in ids.tolist()]))
        return np.frombuffer(b"".join(replies), np.uint8).reshape(len(ids), -1)

    def pipeline(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        page_rows, width, stored = self._table.page_rows, self._table.row_bytes, self._table.stored_bytes
        pipeline = self._client.pipeline(transaction=False)
        for row in ids.tolist():
            start = row % page_rows * stored
            pipeline.getrange(self._prefix + b"%d" % (row // page_rows), start, start + width - 1)
        return np.frombuffer(b"".join(pipeline.execute()), np.uint8).reshape(len(ids), -1)

    def server_seconds(self) -> float:
        """CPU time of the server's main thread."""
        cpu = cast(dict[str, float], self._client.info("cpu"))
        return cpu["used_cpu_user_main_thread"] + cpu["used_cpu_sys_main_thread"]


def measure_fetches(sides: Sides, size: int, per_block: int, blocks: int, rng: np.random.Generator) -> dict[str, float]:
    """Milliseconds of each side for one fetch of `size` ids, of the server's CPU for one of ours, and ratios within
    a block, whose parts meet what else the machine does at nearly the same time."""

    def ids() -> NDArray[np.int64]:
        return rng.permutation(np.unique(rng.integers(0, len(sides.rows), size + size // 8)))[:size]

    for name, fetch in sides.all().items():
        some = ids()
        if not np.array_equal(fetch(some), sides.rows[some]):
            raise SystemExit(f"{name} gives wrong rows")
    found: dict[str, list[float]] = {}
    for _ in range(blocks):
        wall, cpu = {}, 0.0
        for name, fetch in sides.all().items():
            batches = [ids() for _ in range(per_block)]
            before = sides.server_seconds()
            wall[name] = statistics.median(seconds(fetch, batch) for batch in batches)
            if name == "fetch":
                cpu = (sides.server_seconds() - before) / per_block
        block = {f"{name}_ms": elapsed * 1e3 for name, elapsed in wall.items()} | {"server_cpu_ms": cpu * 1e3}
        block |= {f"fetch_vs_{peer}": wall[peer] / wall["fetch"] for peer in ("mget", "pipeline")}
        for name, value in (block | {"wall_vs_server_cpu": wall["fetch"] / cpu}).items():
            found.setdefault(name, []).append(value)
    return {f"{name}.{size}": statistics.median(values) for name, values in found.items()}


def seconds(fetch: Fetch, ids: NDArray[np.int64]) -> float:
    began = time.perf_counter()
    fetch(ids)
    return time.perf_counter() - began


def run(options: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    for kind, width in WIDTHS.items():
        with tempfile.TemporaryDirectory() as name, redis_server(Path(name)) as socket:
            bundle = Path(name) / "bundle"
            manifest = write_bundle(bundle, options.rows, kind)
            with redis.Redis(unix_socket_path=str(socket)) as client, open_backend(f"redis+unix://{socket}") as backend:
                ratio = measure_memory(client, backend, bundle, options.rows * width)
                figures[f"bytes_per_row_ratio.{kind}"] = ratio
                if kind == FETCHED:
                    sides = Sides(backend, manifest, socket, bundle / "tables" / "item.pages")
                    rng = np.random.default_rng(0)
                    for size, per_block in BATCHES.items():
                        figures |= measure_fetches(sides, size, per_block, options.blocks, rng)
    for name, worse in (("fetch_vs_mget", min), ("fetch_vs_pipeline", min), ("wall_vs_server_cpu", max)):
        figures[name] = worse(figures[f"{name}.{size}"] for size in BATCHES)
    return figures


def show(figures: dict[str, float], rows: int) -> None:
    console = Console()
    names = ("fetch_ms", "server_cpu_ms", "mget_ms", "pipeline_ms")
    ratios = ("fetch_vs_mget", "fetch_vs_pipeline", "wall_vs_server_cpu")
    table = Table("ids", "fetch", "CPU", "mget", "pipeline", "× mget", "× pipeline", "wall/CPU")
    for size in BATCHES:
        table.add_row(f"{size:,}", *(f"{figures[f'{name}.{size}']:.2f}" for name in (*names, *ratios)))
    table.title = f"random rows of {WIDTHS[FETCHED]} bytes out of {rows:,}: ms, and ratios"
    table.caption = "CPU: of the server's main thread, for one fetch of ours"
    console.print(table)
    memory = Table("bytes a row", "Redis bytes a row", "ratio", title=f"{rows:,} rows in Redis")
    for kind, width in WIDTHS.items():
        ratio = figures[f"bytes_per_row_ratio.{kind}"]
        memory.add_row(kind.replace("_", " ids, "), f"{ratio * width:.1f}", f"{ratio:.3f}")
    console.print(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--blocks", type=int, default=20, help="of fetches, for each side and number of ids")
    parser.add_argument("--json", action="store_true", help="one JSON object after the tables")
    options = parser.parse_args()
    figures = run(options)
    show(figures, options.rows)
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
