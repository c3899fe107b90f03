"""Rows out of memory-mapped files: opening, what stays in memory, a look-up of 20 tables, and reading from a cold disk.

    python scripts/bench/mapped.py [--folder DIR] [--cold-gib 2] [--json]

Opening: 10 tables of 8,000,000 rows of 128 bytes (files without blocks on disk), to the end of the first fetch of 1,000
random rows; resident memory is what that fetch added of the process's memory backed by files. Look-up: 100 random ids
over 20 tables that are in memory. Cold: 1,000 random rows of one table under DIR, which the system was made to forget
before each fetch; with reading ahead as the store does it, without, and through a mapping as the system makes it by
default. Medians; ratios above 1 mean that the store's way is faster. DIR has to be on a disk (default: the
system's folder for temporary files).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from embedding_store.batch import IdBatch
from embedding_store.codec import page_rows
from embedding_store.memmap_read import MappedTables
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.row_checks import table_seed, with_checks

WIDTH = 128
COLD_IDS = 1000


def table_info(name: str, rows: int) -> TableInfo:
    return TableInfo(name, rows, WIDTH // 4, "fp32", WIDTH, page_rows(WIDTH), "")


def release(tables: list[TableInfo]) -> ReleaseManifest:
    return ReleaseManifest("bench", "1", "2026-01-01T00:00:00Z", tuple(tables))


def batch(rng: np.random.Generator, tables: int, ids: int, rows: int) -> IdBatch:
    return IdBatch(np.arange(tables), np.full(tables, ids), rng.integers(0, rows, tables * ids))


def random_rows(rng: np.random.Generator, table: TableInfo, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """As they are stored: uint8 [n, stored_bytes]."""
    return with_checks(table_seed(table), ids, rng.integers(0, 256, (len(ids), WIDTH), np.uint8))


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssFile")).split()[1])


def measure_opening(folder: Path) -> dict[str, float]:
    tables, rows = 10, 8_000_000
    rng = np.random.default_rng(0)
    asked = batch(rng, tables, 100, rows)
    infos = [table_info(f"t{place}", rows) for place in range(tables)]
    for place in range(tables):
        with (folder / f"t{place}.pages").open("wb") as file:
            file.truncate(infos[place].bytes)
            ids = asked.ids[100 * place : 100 * (place + 1)]
            for key, row in zip(ids, random_rows(rng, infos[place], ids), strict=True):
                file.seek(int(key) * infos[place].stored_bytes)
                file.write(row.data)
    MappedTables(release(infos), folder).fetch(batch(np.random.default_rng(1), tables, 0, rows))  # compiles
    before, began = resident_file_bytes(), time.perf_counter()
    mapped = MappedTables(release(infos), folder)
    fetched = mapped.fetch(asked)
    seconds, resident = time.perf_counter() - began, resident_file_bytes() - before
    if fetched.error is not None:
        raise SystemExit(str(fetched.error))
    return {"open_10gb_s": seconds, "open_10gb_resident_mb": resident / 1e6}


def measure_look_up(folder: Path) -> dict[str, float]:
    tables, rows = 20, 100_000
    rng = np.random.default_rng(2)
    infos = [table_info(f"w{place}", rows) for place in range(tables)]
    for info in infos:
        random_rows(rng, info, np.arange(rows)).tofile(folder / f"{info.name}.pages")
    mapped = MappedTables(release(infos), folder)
    batches = [batch(rng, tables, 5, rows) for _ in range(2000)]
    seconds = []
    for asked in batches:
        began = time.perf_counter()
        mapped.fetch(asked)
        seconds.append(time.perf_counter() - began)
    return {"look_up_100_ids_us": statistics.median(seconds) * 1e6}


def measure_cold(folder: Path, size: int, fetches: int = 7) -> dict[str, float]:
    path, rows = folder / "cold.pages", size // WIDTH
    rng, info = np.random.default_rng(3), table_info("cold", rows)
    with path.open("wb") as file:
        for ids in np.array_split(np.arange(rows), max(1, size >> 24)):
            random_rows(rng, info, ids).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    ahead, alone = (MappedTables(release([info]), folder) for _ in range(2))

    def without(asked: IdBatch) -> None:
        alone._cold = False  # reading ahead is what a fetch does after one that found the disk cold
        alone.fetch(asked)

    def default(asked: IdBatch) -> NDArray[np.uint8]:
        taken: NDArray[np.uint8] = np.memmap(path, np.uint8, "r", shape=(rows, info.stored_bytes))[asked.ids]
        return taken

    ways: dict[str, Callable[[IdBatch], object]] = {"ahead": ahead.fetch, "alone": without, "default": default}
    for way in ways.values():  # maps the file
        way(batch(rng, 1, 1, rows))
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    with path.open("rb") as file:
        for _ in range(fetches):
            for name, way in ways.items():
                asked = batch(rng, 1, COLD_IDS, rows)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                began = time.perf_counter()
                way(asked)
                milliseconds[name].append((time.perf_counter() - began) * 1e3)
    figures = {f"cold_{name}_ms": statistics.median(values) for name, values in milliseconds.items()}
    return figures | {
        "cold_vs_alone": figures["cold_alone_ms"] / figures["cold_ahead_ms"],
        "cold_vs_default": figures["cold_default_ms"] / figures["cold_ahead_ms"],
    }


def show(figures: dict[str, float]) -> None:
    table = Table("", "", title="memory-mapped tables")
    table.add_row("release of 10 GB, to the end of its first 1,000 rows", f"{figures['open_10gb_s'] * 1e3:.1f} ms")
    table.add_row("memory that it took", f"{figures['open_10gb_resident_mb']:.1f} MB")
    table.add_row("100 ids over 20 tables, in memory", f"{figures['look_up_100_ids_us']:.1f} µs")
    table.add_row("1,000 rows from a cold disk", f"{figures['cold_ahead_ms']:.1f} ms")
    table.add_row("    without reading ahead", f"{figures['cold_alone_ms']:.1f} ms")
    table.add_row("    by a mapping as the system makes it", f"{figures['cold_default_ms']:.1f} ms")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--cold-gib", type=int, default=2, help="size of the table that is read from disk")
    parser.add_argument("--json", action="store_true", help="one JSON object after the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        figures = measure_opening(folder) | measure_look_up(folder) | measure_cold(folder, options.cold_gib << 30)
    show(figures)
    if options.json:
        print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
