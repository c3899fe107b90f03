"""POST /rank over HTTP: rows out of the service's own store, beside rows out of a sidecar.

    python scripts/bench/rank.py [--candidates 500] [--requests 400] [--json]

Starts both as real processes on a small model of 12 features, two of them sequences of 20, over memmap:// pages; one
client, one request at a time over one connection. The stages are means out of the service's own /metrics; what they
leave of the total is HTTP and the way to the ranking thread and back.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from tests.serving.bundle_factory import CATEGORIES, ITEM_ROWS, LAST, build_bundle, publish_bundle, random_request
from tests.serving.running import running_service, running_sidecar

STAGES = ("decode", "features", "lookup", "graph", "encode")
WARM_UP = 50


def bodies(candidates: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    requests = [random_request(rng, candidates) for _ in range(16)]
    for request in requests:
        request["user"]["recent_items"] = rng.integers(0, ITEM_ROWS, LAST).tolist()
        request["user"]["recent_categories"] = [str(name) for name in rng.choice(CATEGORIES, LAST)]
    return [json.dumps(request).encode() for request in requests]


def stage_seconds(client: httpx.Client) -> dict[str, float]:
    text = client.get("/metrics").text
    return {
        stage: float(re.search(rf'torchrank_stage_seconds_sum\{{stage="{stage}"\}} (\S+)', text)[1])  # type: ignore[index]
        for stage in STAGES
    }


def measure(urls: dict[str, str], requests: list[bytes], repeat: int) -> dict[str, dict[str, Any]]:
    """In turns, so that whatever else the machine does is shared fairly."""
    seconds: dict[str, list[float]] = {name: [] for name in urls}
    with ExitStack() as opened:
        clients = {name: opened.enter_context(httpx.Client(base_url=url)) for name, url in urls.items()}
        for client in clients.values():
            for i in range(WARM_UP):
                client.post("/rank", content=requests[i % len(requests)]).raise_for_status()
        before = {name: stage_seconds(client) for name, client in clients.items()}
        for i in range(repeat):
            for name, client in clients.items():
                began = time.perf_counter()
                answer = client.post("/rank", content=requests[i % len(requests)])
                seconds[name].append(time.perf_counter() - began)
                answer.raise_for_status()
        after = {name: stage_seconds(client) for name, client in clients.items()}
    found = {}
    for name in urls:
        p50, p99 = np.percentile(seconds[name], [50, 99]) * 1e3
        stages = {stage: (after[name][stage] - before[name][stage]) / repeat * 1e3 for stage in STAGES}
        found[name] = {"p50_ms": float(p50), "p99_ms": float(p99), "stages_ms": stages}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    requests = bodies(options.candidates)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, store, socket = build_bundle(folder / "bundle"), f"memmap://{folder / 'store'}", folder / "sidecar.sock"
        publish_bundle(model, store)
        served = (model.folder, "--variant", "fp32")
        with (
            running_service(folder / "store.log", *served, "--store", store, "--cache-size", "0") as own,
            running_sidecar(folder / "sidecar.log", store, socket),
            running_service(folder / "client.log", *served, "--sidecar", socket) as client,
        ):
            found = measure({"store": own.url, "sidecar": client.url}, requests, options.requests)
    report(found, options.candidates)
    if options.json:
        ratio = found["sidecar"]["p50_ms"] / found["store"]["p50_ms"]
        print(json.dumps({"candidates": options.candidates, **found, "sidecar_over_store_p50": ratio}))


def report(found: dict[str, dict[str, Any]], candidates: int) -> None:
    table = Table(title=f"POST /rank, {candidates} candidates, ms; stages are means")
    for heading in ("rows from", "p50", "p99", *STAGES):
        table.add_column(heading, justify="left" if heading == "rows from" else "right")
    for name, result in found.items():
        numbers = [result["p50_ms"], result["p99_ms"], *result["stages_ms"].values()]
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
