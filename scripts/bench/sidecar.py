"""What a look-up costs through a sidecar, beside the same store behind a Python gRPC server and in this process.

    python scripts/bench/sidecar.py [--store memmap|redis] [--json]
    python scripts/bench/sidecar.py --rss [--store memmap|redis] [--json]     only: memory, minutes

One client over a unix socket; sidecar and gRPC take turns every 20 requests, so that whatever else the machine does
meets both. Hot rows are in the cache after warming; each id is one of them with probability --hit-rate. Then --clients
processes at once, each as fast as it is answered, for one server after the other.

--rss: tables of 4 GB behind a cache of 256 MiB, a million look-ups of Zipf traffic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from embedding_store.client import SidecarClient
from embedding_store.lookup import EmbeddingLookup
from embedding_store.open import open_backend, open_store
from scripts.bench.sidecar_clients import Load, measure_clients
from scripts.bench.sidecar_memory import measure_memory
from scripts.bench.sidecar_store import (
    RELEASE,
    Request,
    Shape,
    hit_or_miss_requests,
    hot_ids,
    publish,
    running,
    store_url,
)

_TURN = 20  # requests to one side, then to the other: one alone would find the processor busy with the other's rest
HAS_GRPC = importlib.util.find_spec("grpc") is not None


def measure(
    sides: Mapping[str, EmbeddingLookup], requests: list[Request], warmup: int
) -> dict[str, NDArray[np.float64]]:
    """Seconds per request of each side, without the first `warmup`."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for first in range(0, len(requests), _TURN):
        for name, lookup in sides.items():
            for request in requests[first : first + _TURN]:
                began = time.perf_counter()
                lookup.lookup(RELEASE, request)
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[warmup:]) for name, values in seconds.items()}


def check_equal(sides: Mapping[str, EmbeddingLookup], request: Request) -> None:
    first, *others = [lookup.lookup(RELEASE, request).tables for lookup in sides.values()]
    for name, table in first.items():
        for other in others:
            if not np.array_equal(table.rows[table.index], other[name].rows[other[name].index]):
                raise SystemExit(f"the sides differ in table {name}")


def measure_lookups(options: argparse.Namespace) -> dict[str, object]:
    shape = Shape(options.tables, options.rows, options.dim, int(options.rows * options.hot_share))
    hot, cache_bytes = hot_ids(shape), shape.hot_cache_bytes(options.cache_slack)
    wanted = (hot, shape, options.ids, options.hit_rate)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        url = stack.enter_context(store_url(options.store, Path(folder)))
        with open_backend(url) as backend:
            publish(backend, shape, hot)
        requests = hit_or_miss_requests(*wanted, options.requests + options.warmup, seed=1)
        with open_store(url, cache_bytes=cache_bytes) as direct:
            direct.warm(RELEASE)
            manifest = direct.manifest(RELEASE)
            seconds = measure({"direct": direct}, requests, options.warmup)
        socket, grpc_socket = f"{folder}/s.sock", f"{folder}/g.sock"
        served = ("--store", url, "--cache-size", str(cache_bytes))
        stack.enter_context(running("torchrank.cli", "sidecar", *served, "--socket", socket))
        client = stack.enter_context(SidecarClient(socket))
        sides: dict[str, EmbeddingLookup] = {"sidecar": client}
        if HAS_GRPC:
            from scripts.bench.sidecar_grpc import GrpcClient

            stack.enter_context(running("scripts.bench.sidecar_grpc", *served, "--socket", grpc_socket))
            sides["grpc"] = stack.enter_context(GrpcClient(grpc_socket, manifest))
            check_equal(sides, requests[0])
        seconds |= measure(sides, requests, options.warmup)
        info = client.info()
        shares = [(*wanted, 200, seed) for seed in range(options.clients)]
        loads = {"sidecar": measure_clients(SidecarClient, (socket,), hit_or_miss_requests, shares, options.seconds)}
        if HAS_GRPC:
            arguments = (grpc_socket, manifest)
            loads["grpc"] = measure_clients(GrpcClient, arguments, hit_or_miss_requests, shares, options.seconds)
    return _result(options, seconds, info, loads)


def _result(
    options: argparse.Namespace,
    seconds: Mapping[str, NDArray[np.float64]],
    info: Mapping[str, str],
    loads: Mapping[str, Load],
) -> dict[str, object]:
    result: dict[str, object] = {
        "store": options.store, "ids": options.ids, "tables": options.tables, "dim": options.dim,
        "hit_rate": float(info["cache_hit_rate"]),
    }  # fmt: skip
    for name, values in seconds.items():
        prefix = "" if name == "sidecar" else f"{name}_"
        for percent in (50, 99):
            result[f"{prefix}p{percent}_ms"] = round(float(np.percentile(values, percent)) * 1e3, 4)
    for percent in (50, 99):
        result[f"server_p{percent}_ms"] = float(info[f"server_p{percent}_us"]) / 1e3
    clients = result[f"clients_{options.clients}"] = dict(loads["sidecar"]._asdict())
    if "grpc" in seconds:
        result["speedup_vs_grpc"] = round(float(np.median(seconds["grpc"]) / np.median(seconds["sidecar"])), 3)
        clients |= {f"grpc_{key}": value for key, value in loads["grpc"]._asdict().items()}
        clients["speedup_vs_grpc"] = round(loads["sidecar"].lookups_per_s / loads["grpc"].lookups_per_s, 3)
    for key in ("lookups_offloaded", "cache_bytes", "used_memory_rss", "used_memory_rss_anonymous"):
        result[key] = int(info[key])
    return result


def show(result: dict[str, object], options: argparse.Namespace) -> None:
    clients = result[f"clients_{options.clients}"]
    assert isinstance(clients, dict)
    title = f"{options.ids} ids over {options.tables} tables, dim {options.dim} fp16, {options.store}"
    many = f"{options.clients} clients"
    table = Table(
        "", "p50 ms", "p99 ms", f"{many}: look-ups/s", "p50 ms", "p99 ms",
        title=f"{title}, hits {result['hit_rate']:.1%}",
    )  # fmt: skip
    for label, prefix in (("sidecar, unix socket", ""), ("gRPC, unix socket", "grpc_"), ("in this process", "direct_")):
        if f"{prefix}p50_ms" in result:
            row = [f"{result[f'{prefix}p{percent}_ms']:.3f}" for percent in (50, 99)]
            if f"{prefix}lookups_per_s" in clients:
                row.append(f"{clients[f'{prefix}lookups_per_s']:,.0f}")
                row += [f"{clients[f'{prefix}p{percent}_ms']:.3f}" for percent in (50, 99)]
            table.add_row(label, *row)
    table.add_row("the sidecar's own work", f"{result['server_p50_ms']:.3f}", f"{result['server_p99_ms']:.3f}")
    Console().print(table)
    if "speedup_vs_grpc" in result:
        print(f"gRPC / sidecar: {result['speedup_vs_grpc']:.2f}; {many}: {clients['speedup_vs_grpc']:.2f}")
    else:
        print("grpcio is not installed here: nothing was compared with it (it is in the dev extra)")


def show_memory(found: dict[str, float], store: str) -> None:
    mib = {name: f"{value / 2**20:,.0f} MiB" for name, value in found.items() if name.endswith(("bytes", "budget"))}
    table = Table("", "", title=f"sidecar over {store}://, cache {mib['cache_budget']}", show_header=False)
    table.add_row("tables", mib["table_bytes"])
    table.add_row("look-ups, ids", f"{found['lookups']:,.0f}, {found['ids']:,.0f}")
    table.add_row("hit rate", f"{found['hit_rate']:.1%}")
    table.add_row("resident at the start", mib["at_start_bytes"])
    table.add_row("resident at the end (peak)", f"{mib['resident_bytes']} ({mib['peak_resident_bytes']})")
    table.add_row("… its own (peak)", f"{mib['anonymous_bytes']} ({mib['peak_anonymous_bytes']})")
    table.add_row("… pages of mapped files, libraries among them", mib["mapped_bytes"])
    table.add_row("peak beyond the cache (its own)", f"{mib['above_cache_bytes']} ({mib['own_above_cache_bytes']})")
    Console().print(table)


def flat(result: Mapping[str, object]) -> dict[str, object]:
    """{"clients_8": {"p50_ms": 1}} -> {"clients_8.p50_ms": 1}, as the other benchmarks of the store have their keys."""
    figures: dict[str, object] = {}
    for name, value in result.items():
        if isinstance(value, Mapping):
            figures |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            figures[name] = value
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("memmap", "redis"), default="memmap")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--ids", type=int, default=2000, help="in one request, over all tables")
    parser.add_argument("--tables", type=int, default=20)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rows", type=int, default=100_000, help="of each table")
    parser.add_argument("--hot-share", type=float, default=0.1, help="of the rows, in the hot list")
    parser.add_argument("--hit-rate", type=float, default=0.95)
    parser.add_argument("--cache-slack", type=float, default=2.0, help="cache size over that of the hot rows")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="for which the clients ask")
    parser.add_argument("--rss", action="store_true")
    parser.add_argument("--rss-rows", type=int, default=6_250_000, help="of each table")
    parser.add_argument("--rss-lookups", type=int, default=1_000_000)
    parser.add_argument("--rss-ids", type=int, default=60, help="in one look-up, over all tables")
    parser.add_argument("--rss-zipf", type=float, default=1.05, help="exponent of the ids' distribution")
    parser.add_argument("--json", action="store_true", help="one JSON object after the table")
    options = parser.parse_args()
    if options.rss:
        found = measure_memory(
            options.store, Shape(options.tables, options.rss_rows, options.dim, 0), cache_bytes=256 << 20,
            lookups=options.rss_lookups, ids=options.rss_ids, exponent=options.rss_zipf, clients=2,
        )  # fmt: skip
        show_memory(found, options.store)
        result: dict[str, object] = {"store": options.store, "rss": found}
    else:
        result = measure_lookups(options)
        show(result, options)
    if options.json:
        print(json.dumps(flat(result)))


if __name__ == "__main__":
    sys.exit(main())
