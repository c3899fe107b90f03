"""What scripts/bench/sidecar*.py measure with: a release of random tables, requests for it, and who serves it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding_store.backend import Backend
from embedding_store.chunks import Chunk
from embedding_store.codec import page_rows
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.row_checks import table_seed, with_checks
from scripts.bench.redis_server import redis_server

Request = Mapping[str, NDArray[np.int64]]
RELEASE = "bench@1"
_CHUNK_PAGES = 512
_ENTRY_OVERHEAD = 24  # bytes that the cache keeps beside a row, roughly


@dataclass(frozen=True)
class Shape:
    """tables of rows x dim, fp16; hot: ids of each in its hot list."""

    tables: int
    rows: int
    dim: int
    hot: int

    @property
    def row_bytes(self) -> int:
        return 2 * self.dim

    @property
    def names(self) -> list[str]:
        return [f"table_{number:02d}" for number in range(self.tables)]

    def hot_cache_bytes(self, slack: float) -> int:
        """A cache for `slack` times the hot rows."""
        return int(self.tables * self.hot * (self.row_bytes + _ENTRY_OVERHEAD) * slack)


def publish(backend: Backend, shape: Shape, hot: Mapping[str, NDArray[np.int64]]) -> None:
    """Random rows, one table in memory at a time."""
    rng = np.random.default_rng(0)
    states, infos = [], []
    for name in shape.names:
        states.append(rng.bit_generator.state)
        digest = hashlib.sha256(_rows(rng, shape)).hexdigest()  # which nobody compares with the stored rows
        pages = page_rows(shape.row_bytes)
        infos.append(TableInfo(name, shape.rows, shape.dim, "fp16", shape.row_bytes, pages, digest, len(hot[name])))
    manifest = ReleaseManifest("bench", "1", "2024-01-01T00:00:00Z", tuple(infos))
    with backend.writer(manifest) as writer:
        for info, state in zip(infos, states, strict=True):
            rng.bit_generator.state = state
            for chunk in _chunks(info, _rows(rng, shape)):
                writer.write(info, chunk)
            writer.write_hot(info, hot[info.name].tobytes())
        writer.commit()
    backend.set_history("bench", (), (manifest.name,))


def _chunks(info: TableInfo, content: bytes) -> Iterator[Chunk]:
    encoded = np.frombuffer(content, np.uint8).reshape(info.rows, info.row_bytes)
    rows = with_checks(table_seed(info), np.arange(info.rows), encoded)
    for first in range(0, info.rows, step := _CHUNK_PAGES * info.page_rows):
        part = rows[first : first + step]
        bounds = np.append(np.arange(0, len(part), info.page_rows), len(part))
        yield Chunk(first // info.page_rows, first, bounds, part, np.empty(0, np.int64))


def _rows(rng: np.random.Generator, shape: Shape) -> bytes:
    return rng.bytes(shape.rows * shape.row_bytes)


def hot_ids(shape: Shape) -> dict[str, NDArray[np.int64]]:
    rng = np.random.default_rng(1)
    return {name: rng.choice(shape.rows, shape.hot, replace=False) for name in shape.names}


def hit_or_miss_requests(
    hot: Mapping[str, NDArray[np.int64]], shape: Shape, ids: int, hit_rate: float, count: int, seed: int
) -> list[Request]:
    """Each id is a hot one with probability `hit_rate`, else any."""
    rng = np.random.default_rng(seed)
    per_table = ids // shape.tables
    return [
        {
            name: np.where(
                rng.random(per_table) < hit_rate, rng.choice(some, per_table), rng.integers(0, shape.rows, per_table)
            )
            for name, some in hot.items()
        }
        for _ in range(count)
    ]


def zipf_ids(rng: np.random.Generator, exponent: float, rows: int, count: int) -> NDArray[np.int64]:
    """Ranks by the inverse of the continuous distribution, scattered over the table: hot ids are no neighbours."""
    power = 1.0 - exponent
    ranks = ((rows**power - 1.0) * rng.random(count) + 1.0) ** (1.0 / power)
    return (ranks.astype(np.int64) * 0x9E3779B1) % rows


@contextmanager
def store_url(kind: str, folder: Path) -> Iterator[str]:
    """An empty store: a directory, or a redis-server of this benchmark's own."""
    if kind == "memmap":
        yield f"memmap://{folder}/store"
        return
    with redis_server(folder) as socket:
        yield f"redis+unix://{socket}"


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m arguments`, from its line that starts with "ready" on."""
    command: Sequence[str] = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith("ready"):
            raise SystemExit(f"{' '.join(arguments[:2])} did not start")
        yield process
    finally:
        process.terminate()
        process.wait()
