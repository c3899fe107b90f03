"""The demonstration behind scripts/demo: every step is the command that a user would type.

Writes outputs/demo/TIME/ (run, bundle, store, logs) and outputs/demo/summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from embedding_store.client import SidecarClient
from export.assemble import Assembler
from export.bundle import Manifest, read_golden, read_manifest
from export.graph import graph_inputs
from torchrank.features.transform import FeatureTransform

REQUESTS = 200
CANDIDATES = 500
RANKS = 2
BIN = Path(sys.executable).parent
CONSOLE = Console()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="From raw columns to a ranked list, on this machine."
    )
    parser.add_argument("--store", help="URL of a store; by default memory-mapped files below outputs/demo")
    parser.add_argument("--data", type=Path, default=Path("data/feed"), help="written when it is not there")
    parser.add_argument("--rows-per-day", type=int, default=60_000, help="of data that is written")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cache-size", default="256KiB", help="of the sidecar")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    options = parser.parse_args()

    started = time.perf_counter()
    folder = options.output / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    store = options.store or f"memmap://{(folder / 'store').resolve()}"
    summary: dict[str, Any] = {}
    with _show_failure():
        best = make_data(options, folder)
        summary["train"] = train(options, folder)
        summary["auc"] = evaluate(folder)
        summary["auc_best_reachable"] = best
        manifest = export_and_publish(folder, store, summary)
        with ExitStack() as running:
            address = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="torchrank-"))) / "sidecar.sock"
            sidecar = ["sidecar", "--store", store, "--socket", str(address), "--cache-size", options.cache_size]
            running.enter_context(_service("sidecar", sidecar, folder, ready="ready"))
            requests = make_requests(manifest, options.data)
            serve_and_measure(manifest, folder, address, requests, summary)
            summary |= look_up_and_measure(manifest, address, requests)
            summary["sidecar"]["cache_size"] = options.cache_size
    summary["seconds"] = round(time.perf_counter() - started, 1)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary, folder)


def make_data(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The best test AUC that any model could reach, per task: the data set knows its labels' true probabilities."""
    rows = ["--rows-per-day", str(options.rows_per_day)]
    _run(
        "data", ["data", "feed", "--output", str(options.data), *rows], folder, "data: days of a video feed as Parquet"
    )
    best: dict[str, float] = json.loads((options.data / "meta.json").read_text())["auc_best_reachable"]["test"]
    return best


def train(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    run = folder / "run"
    overrides = [
        *("+model=mmoe", "sharding=row_wise", f"data.path={options.data}", f"run_dir={run}"),
        *("model.attention={history_item: item_id, history_category: category}", "training.log_every=5"),
        *(f"training.epochs={options.epochs}", f"training.batch_size={1024 * RANKS}"),
    ]
    launch = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={RANKS}", "-m", "torchrank.train", *overrides]
    _run("train", launch, folder, f"train: MMoE on {RANKS} ranks, tables sharded row-wise")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [record["samples_per_s"] for record in records if record["kind"] == "train"]
    return {"world_size": RANKS, "samples_per_s": round(float(np.median(speeds)))}


def evaluate(folder: Path) -> dict[str, float]:
    output = _run("evaluate", ["evaluate", "--run", str(folder / "run"), "--json"], folder, "evaluate: the test day")
    return {task: values["auc"] for task, values in json.loads(output.splitlines()[-1]).items()}


def export_and_publish(folder: Path, store: str, summary: dict[str, Any]) -> Manifest:
    bundle = folder / "bundle"
    export = ["export", "--run", str(folder / "run"), "--output", str(bundle), "--fp16"]
    _run("export", export, folder, "export: ONNX graph in fp32 and fp16, table pages, parity gate")
    _run("publish", ["publish", str(bundle), "--store", store, "--activate"], folder, "publish: one immutable release")
    manifest = read_manifest(bundle)
    summary["bundle"] = {
        "dense_bytes": {variant.name: variant.bytes for variant in manifest.variants},
        "table_bytes": sum(table.bytes for table in manifest.tables),
    }
    return manifest


def make_requests(manifest: Manifest, data: Path) -> list[dict[str, Any]]:
    """Raw values: users of the test day with their context, and candidates drawn as the feed showed them."""
    columns = manifest.features.columns
    rows = pq.read_table(data / "test", columns=list(columns)).to_pylist()
    rng = np.random.default_rng(0)

    def side(row: Mapping[str, Any], *sides: str) -> dict[str, Any]:
        return {name: row[name] for name, column in columns.items() if column.side in sides}

    return [
        {
            "user": side(rows[asked], "user"),
            "context": side(rows[asked], "context"),
            "candidates": [side(rows[shown], "item") for shown in rng.integers(0, len(rows), CANDIDATES)],
        }
        for asked in rng.integers(0, len(rows), REQUESTS)
    ]


def serve_and_measure(
    manifest: Manifest, folder: Path, address: Path, requests: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> None:
    summary["parity"] = {"max_abs_diff": {}}
    for variant in manifest.variants:
        arguments = ["serve", str(folder / "bundle"), "--sidecar", str(address), "--port", "0"]
        with _service(
            f"serve.{variant.name}", [*arguments, "--variant", variant.name], folder, ready="http://"
        ) as line:
            url = next(word for word in line.split() if word.startswith("http://"))
            with httpx.Client(base_url=url, timeout=30) as client:
                difference = parity(client, folder / "bundle")
                summary["parity"]["max_abs_diff"][variant.name] = difference
                if variant.name == "fp32":
                    with CONSOLE.status(f"rank: {REQUESTS} requests of {CANDIDATES} candidates"):
                        summary["rank"] = {"candidates": CANDIDATES, **measure_ranking(client, requests)}


def look_up_and_measure(manifest: Manifest, address: Path, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    with SidecarClient(str(address)) as client:
        latency = measure_sidecar(client, manifest, requests)
        info = client.info()
    return {
        "sidecar": {**latency, "hit_rate": float(info["cache_hit_rate"])},
        "serving": {
            "sidecar_rss_bytes": int(info["used_memory_rss"]),
            # Without the pages of mapped files, which the kernel may take back at any time.
            "sidecar_private_bytes": int(info["used_memory_rss_anonymous"]),
        },
    }


def parity(client: httpx.Client, bundle: Path) -> float:
    """The largest difference between what the service answers to the golden requests and the trainer's scores."""
    worst = 0.0
    for golden in read_golden(bundle):
        request = {"user": golden.user, "context": golden.context, "candidates": golden.candidates}
        scores = _ranked(client.post("/rank", json=request))["scores"]
        worst = max(worst, *(float(np.abs(np.subtract(scores[task], golden.scores[task])).max()) for task in scores))
    return worst


def measure_ranking(client: httpx.Client, requests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """From the first byte sent to the last received: HTTP and the service's JSON, not this client's."""
    seconds = []
    for body in [json.dumps(request).encode() for request in requests]:
        begin = time.perf_counter()
        answer = client.post("/rank", content=body)
        seconds.append(time.perf_counter() - begin)
        assert sorted(_ranked(answer)["order"]) == list(range(CANDIDATES))
    return _percentiles(seconds)


def measure_sidecar(client: SidecarClient, manifest: Manifest, requests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The look-ups of the same requests, seen from the inference host's side of the socket."""
    transform = FeatureTransform(manifest.features)
    names = graph_inputs(manifest.schema)
    inputs = {name: np.int64 if name.endswith(("user_index", ".length")) else np.float32 for name in names}
    assembler = Assembler(manifest.schema, manifest.tables, inputs)
    wanted = [assembler.ids(transform.from_request(r["user"], r["context"], r["candidates"])) for r in requests]
    seconds = []
    for ids in wanted:
        begin = time.perf_counter()
        client.lookup(manifest.release, ids)
        seconds.append(time.perf_counter() - begin)
    return _percentiles(seconds)


def show(summary: Mapping[str, Any], folder: Path) -> None:
    auc, best = summary["auc"], summary["auc_best_reachable"]
    difference, dense = summary["parity"]["max_abs_diff"], summary["bundle"]["dense_bytes"]
    rank, sidecar, serving = summary["rank"], summary["sidecar"], summary["serving"]
    table = Table("step", "measured", "what it is", title="From raw columns to a ranked list", title_justify="left")
    rows = [
        ("train", f"{summary['train']['samples_per_s']:,} samples/s", f"{RANKS} ranks, each with half of every table"),
        *(
            ("evaluate", f"{task} AUC {auc[task]:.4f}", f"unseen day; the best reachable is {best[task]:.4f}")
            for task in auc
        ),
        (
            "export",
            f"{dense['fp32'] / 1e6:.2f} MB, fp16 {dense['fp16'] / 1e6:.2f}",
            "dense graph, whatever the tables' size",
        ),
        ("publish", f"{summary['bundle']['table_bytes'] / 1e6:.1f} MB", "embedding rows, now in the store"),
        ("sidecar", f"{sidecar['p50_ms']:.2f} ms, p99 {sidecar['p99_ms']:.2f}", "all embedding rows of a request"),
        ("", f"{sidecar['hit_rate']:.2%} hits", f"by a cache of {sidecar['cache_size']}"),
        ("", f"{serving['sidecar_private_bytes'] / 1e6:.0f} MB", "memory: interpreter, kernels, cache"),
        ("rank", f"{rank['p50_ms']:.1f} ms, p99 {rank['p99_ms']:.1f}", f"{rank['candidates']} candidates, over HTTP"),
        ("parity", f"{difference['fp32']:.0e}, fp16 {difference['fp16']:.0e}", "service against trainer, at most"),
    ]
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)
    CONSOLE.print(f"{summary['seconds']:.0f} s; files: {folder}, figures: {folder.parent}/summary.json", soft_wrap=True)


class StepFailed(Exception):
    """A command of the path failed; says where its output is."""


def _run(name: str, command: list[str], folder: Path, title: str) -> str:
    """Runs a torchrank command (or another one given by its path) and returns its standard output."""
    if not command[0].startswith("/"):
        command = [str(BIN / "torchrank"), *command]
    begin = time.perf_counter()
    log = folder / f"{name}.log"
    with CONSOLE.status(title), log.open("w") as errors:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if "torchrun" in command[0] else None
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False, env=environment)
    with log.open("a") as lines:
        lines.write(done.stdout)
    if done.returncode:
        raise StepFailed(f"{' '.join(command)}\nfailed ({done.returncode}); its output is in {log}:\n{_tail(log)}")
    CONSOLE.print(f"{title} [{time.perf_counter() - begin:.0f} s]", highlight=False, markup=False)
    return done.stdout


@contextmanager
def _service(name: str, arguments: list[str], folder: Path, ready: str) -> Iterator[str]:
    """Starts `torchrank ARGUMENTS`, yields the line with which it says that it is ready, ends it by SIGTERM."""
    log = folder / f"{name}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(BIN / "torchrank"), *arguments], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if ready in line:
                CONSOLE.print(line.strip(), highlight=False, markup=False, soft_wrap=True)
                yield line
                return
        raise StepFailed(f"torchrank {' '.join(arguments)}\ndid not start; its output is in {log}:\n{_tail(log)}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        process.stdout.close()


@contextmanager
def _show_failure() -> Iterator[None]:
    try:
        yield
    except StepFailed as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-20:])


def _ranked(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code != 200:
        raise StepFailed(f"POST /rank: {answer.status_code} {answer.text}")
    body: dict[str, Any] = answer.json()
    return body


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
    return {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


if __name__ == "__main__":
    main()
