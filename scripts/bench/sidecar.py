"""What a look-up costs through a sidecar, beside the same look-up in this process: the same store, cache and requests.

    python scripts/bench/sidecar.py [--store memmap|redis] [--json]

One client over a unix socket; both sides take turns request by request, so that whatever else the machine does meets
both. Hot rows are as many as the cache holds after warming; each id is one of them with probability --hit-rate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from embedding_store.chunks import whole_table
from embedding_store.client import SidecarClient
from embedding_store.lookup import EmbeddingLookup
from embedding_store.open import open_backend, open_store
from embedding_store.release import ReleaseManifest, TableInfo

Request = dict[str, NDArray[np.int64]]


def build_store(url: str, options: argparse.Namespace) -> dict[str, NDArray[np.int64]]:
    """Random fp16 tables; returns the hot ids of each."""
    rng = np.random.default_rng(0)
    width = 2 * options.dim
    hot_rows = int(options.rows * options.hot_share)
    infos, content, hot = [], {}, {}
    for number in range(options.tables):
        name = f"table_{number:02d}"
        content[name] = rng.integers(0, 256, options.rows * width, np.uint8).tobytes()
        hot[name] = rng.permutation(options.rows)[:hot_rows]
        digest = hashlib.sha256(content[name]).hexdigest()
        page_rows = 8064 // width
        infos.append(TableInfo(name, options.rows, options.dim, "fp16", width, page_rows, digest, hot_rows))
    manifest = ReleaseManifest("bench", "1", "2024-01-01T00:00:00Z", tuple(infos))
    with open_backend(url) as backend:
        with backend.writer(manifest) as writer:
            for info in infos:
                writer.write(info, whole_table(info, content[info.name]))
                writer.write_hot(info, hot[info.name].tobytes())
            writer.commit()
        backend.set_history("bench", (), (manifest.name,))
    return hot


def make_requests(hot: dict[str, NDArray[np.int64]], options: argparse.Namespace) -> list[Request]:
    rng = np.random.default_rng(1)
    per_table = options.ids // options.tables
    requests = []
    for _ in range(options.requests + options.warmup):
        request = {}
        for name, ids in hot.items():
            cold = rng.integers(0, options.rows, per_table)
            request[name] = np.where(rng.random(per_table) < options.hit_rate, rng.choice(ids, per_table), cold)
        requests.append(request)
    return requests


def measure(sides: dict[str, EmbeddingLookup], requests: list[Request], warmup: int) -> dict[str, NDArray[np.float64]]:
    """Seconds per request of each side, without the first `warmup`."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for request in requests:
        for name, lookup in sides.items():
            began = time.perf_counter()
            lookup.lookup("bench@1", request)
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[warmup:]) for name, values in seconds.items()}


def check_equal(sides: dict[str, EmbeddingLookup], request: Request) -> None:
    answers = [lookup.lookup("bench@1", request).tables for lookup in sides.values()]
    for name in request:
        rows = [answer[name].rows[answer[name].index] for answer in answers]
        if not np.array_equal(*rows):
            raise SystemExit(f"the two sides differ in table {name}")


def start_sidecar(url: str, socket: Path, cache_bytes: int) -> subprocess.Popen[str]:
    arguments = ["--store", url, "--socket", str(socket), "--cache-size", str(cache_bytes)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchrank.cli", "sidecar", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if not process.stdout.readline().startswith("ready"):
        raise SystemExit("the sidecar did not start")
    return process


@contextmanager
def store_url(kind: str, folder: Path) -> Iterator[str]:
    """An empty store: a directory, or a redis-server of this benchmark's own."""
    if kind == "memmap":
        yield f"memmap://{folder}/store"
        return
    socket = folder / "redis.sock"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    try:
        while not socket.exists():
            if server.poll() is not None:
                raise SystemExit("redis-server did not start")
            time.sleep(0.02)
        yield f"redis+unix://{socket}"
    finally:
        server.terminate()
        server.wait()


def run(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, store_url(options.store, Path(name)) as url:
        socket = Path(name) / "s.sock"
        hot = build_store(url, options)
        hot_rows = sum(map(len, hot.values()))
        cache_bytes = int(hot_rows * (2 * options.dim + 12) * options.cache_slack)
        process = start_sidecar(url, socket, cache_bytes)
        try:
            requests = make_requests(hot, options)
            with open_store(url, cache_bytes=cache_bytes) as direct, SidecarClient(str(socket)) as client:
                direct.warm("bench@1")
                sides: dict[str, EmbeddingLookup] = {"direct": direct, "sidecar": client}
                check_equal(sides, requests[0])
                seconds = measure(sides, requests, options.warmup)
                info = client.info()
        finally:
            process.terminate()
            process.wait()
    result: dict[str, float] = {"ids": options.ids, "tables": options.tables, "dim": options.dim}
    for name, values in seconds.items():
        for percent in (10, 50, 99):
            result[f"{name}_p{percent}_ms"] = round(float(np.percentile(values, percent)) * 1e3, 4)
    result["ratio_p50"] = round(result["sidecar_p50_ms"] / result["direct_p50_ms"], 3)
    result["server_p50_ms"] = float(info["server_p50_us"]) / 1e3
    result["server_p99_ms"] = float(info["server_p99_us"]) / 1e3
    result["lookups_offloaded"] = int(info["lookups_offloaded"])
    result["hit_rate"] = float(info["cache_hit_rate"])
    result["cache_bytes"] = int(info["cache_bytes"])
    result["rss_bytes"] = int(info["used_memory_rss"])
    result["rss_anonymous_bytes"] = int(info["used_memory_rss_anonymous"])
    return result


def show(result: dict[str, float]) -> None:
    title = (
        f"{result['ids']} ids over {result['tables']} tables, dim {result['dim']} fp16, hits {result['hit_rate']:.1%}"
    )
    table = Table("look-up", "p50 ms", "p99 ms", title=title)
    for name, label in (
        ("direct", "in this process"),
        ("sidecar", "sidecar, unix socket"),
        ("server", "of it: server"),
    ):
        table.add_row(label, f"{result[f'{name}_p50_ms']:.3f}", f"{result[f'{name}_p99_ms']:.3f}")
    console = Console()
    console.print(table)
    console.print(f"sidecar / in process, p50: {result['ratio_p50']:.2f}")
    mib = {name: result[name] / 2**20 for name in ("rss_bytes", "rss_anonymous_bytes", "cache_bytes")}
    console.print(
        f"sidecar's memory: {mib['rss_bytes']:.0f} MiB resident, {mib['rss_anonymous_bytes']:.0f} MiB of it its own "
        f"(cache {mib['cache_bytes']:.0f} MiB), the rest shared files"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("memmap", "redis"), default="memmap")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ids", type=int, default=2000, help="in one request, over all tables")
    parser.add_argument("--tables", type=int, default=20)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rows", type=int, default=100_000, help="of each table")
    parser.add_argument("--hot-share", type=float, default=0.1, help="of the rows, in the hot list")
    parser.add_argument("--hit-rate", type=float, default=0.95)
    parser.add_argument("--cache-slack", type=float, default=2.0, help="cache size over that of the hot rows")
    parser.add_argument("--json", action="store_true", help="one JSON object after the table")
    options = parser.parse_args()
    result = run(options)
    show(result)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
