"""The exporter's graph in ONNX Runtime with all its optimisations, beside ours in fp32, fp16 and int8.

    python scripts/bench/export.py [--only mmoe din …] [--threads 1] [--plot docs/export-latency.svg] [--json]

Models of scripts/bench/export_models.py, trained for a moment, then taken through export_graph and optimize; one
user, 500 candidates. For MMoE also the same module in torch: eager, torch.compile (for these very shapes) and
TorchScript (traced, frozen). Every side's scores are first compared with torch's; the benchmark ends where one is too
far from them. Medians, in turns.

speedup.MODEL_PRECISION is the exporter's graph's time over ours; cpu_speedup.* the same of the process's CPU time,
which other work on the machine does not lengthen. mmoe.best_vs_SIDE is torch's time over that of the fastest of ours.
passes.MODEL.PASS.speedup is the CPU time before a pass over that after it, one pass after another.
peak_memory_ratio.MODEL is the exporter's graph's peak over ours in fp32, each session in processes of its own. Ratios
above 1 mean that ours takes less. flops.* are of 500 candidates; a multiplication and an addition are two.

--plot measures both fp32 graphs of MMoE and DIN for 1 to 5,000 candidates of 1, 4 and 8 users, and draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, where `export` is this very file and not the package

import torch
from rich.console import Console
from rich.table import Table

from scripts.bench.export_memory import peak_memory
from scripts.bench.export_models import BENCH_MODELS, build, random_request, torch_scores
from scripts.bench.export_plot import Curves, draw, sweep
from scripts.bench.export_sessions import Elapsed, Feed, Side, in_onnx_runtime, medians, open_session
from scripts.bench.export_sides import Graphs, check, in_torch, write_graphs
from scripts.bench.export_training import train_briefly
from torchrank.features.schema import FeatureSchema
from torchrank.models import RankModel

OURS = ("fp32", "fp16", "int8")
PEERS = ("eager", "compile", "torchscript")
IN_TORCH = "mmoe"  # measured beside them too
PLOTTED = {"mmoe": "MMoE, 8 experts", "din": "DIN, history of 50"}
_TRAINING_STEPS = 100

Figures = dict[str, float | str]


def measure(name: str, folder: Path, options: argparse.Namespace) -> tuple[Figures, Curves]:
    model, schema = build(name, options.shrink)
    train_briefly(model, schema, steps=_TRAINING_STEPS)
    graphs = write_graphs(model, schema, folder)
    feed = random_request(schema, users=1, candidates=options.candidates, seed=1)
    sides: dict[str, Side] = {
        side: in_onnx_runtime(open_session(file, options.threads), feed) for side, file in graphs.files.items()
    }
    apart = check(name, sides, torch_scores(model, schema, feed))
    elapsed = medians(sides, rounds=options.repeats)
    exporter, ours = elapsed["exporter"], [side for side in OURS if side in elapsed]
    figures: Figures = {f"speedup.{name}_{side}": exporter.wall / elapsed[side].wall for side in ours}
    figures |= {f"cpu_speedup.{name}_{side}": exporter.cpu / elapsed[side].cpu for side in ours}
    figures |= _times(name, elapsed)
    figures |= {f"max_abs_diff.{name}.{side}": value for side, value in apart.items()}
    if name == IN_TORCH:
        best = min(ours, key=lambda side: elapsed[side].cpu)
        figures |= _beside_torch(name, model, schema, feed, sides[best], options)
    figures |= _of_graphs(name, graphs) | _of_passes(name, graphs, feed, options)
    peaks = peak_memory(graphs.files, feed, threads=options.threads)
    figures |= {f"peak_memory_mb.{name}.{side}": value / 1e6 for side, value in peaks.items()}
    figures[f"peak_memory_ratio.{name}"] = peaks["exporter"] / peaks["fp32"]
    drawn = options.plot and name in PLOTTED
    return figures, sweep(graphs.files, schema, threads=options.threads) if drawn else {}


def _beside_torch(
    name: str, model: RankModel, schema: FeatureSchema, feed: Feed, best: Side, options: argparse.Namespace
) -> Figures:
    """The fastest of our graphs in turn with the same module in torch."""
    figures: Figures = {}
    peers: dict[str, Side] = {}
    for side, run in in_torch(model, schema, feed, compiled=not options.no_compile).items():
        if isinstance(run, str):
            figures[f"refused.{name}.{side}"] = run
        else:
            peers[side] = run
    apart = check(name, peers, torch_scores(model, schema, feed))
    elapsed = medians({"best": best, **peers}, rounds=options.repeats)
    for side in peers:
        figures[f"{name}.best_vs_{side}"] = elapsed[side].wall / elapsed["best"].wall
        figures[f"max_abs_diff.{name}.{side}"] = apart[side]
    return figures | _times(name, {side: elapsed[side] for side in peers})


def _times(name: str, elapsed: dict[str, Elapsed]) -> Figures:
    figures: Figures = {f"ms.{name}.{side}": value.wall for side, value in elapsed.items()}
    return figures | {f"cpu_ms.{name}.{side}": value.cpu for side, value in elapsed.items()}


def _of_graphs(name: str, graphs: Graphs) -> Figures:
    figures: Figures = {f"mb.{name}.{side}": file.stat().st_size / 1e6 for side, file in graphs.files.items()}
    for what in ("nodes", "flops"):
        pairs = [getattr(report, what) for report in graphs.reports]
        if pairs:
            figures |= {f"{what}.{name}.exporter": pairs[0][0], f"{what}.{name}.fp32": pairs[-1][1]}
    return figures | {f"refused.{name}.{what}": why for what, why in graphs.refused.items()}


def _of_passes(name: str, graphs: Graphs, feed: Feed, options: argparse.Namespace) -> Figures:
    """The graphs before and after each pass that rewrote something, in turn."""
    steps = {"exporter": graphs.files["exporter"], **graphs.after}
    sides = {step: in_onnx_runtime(open_session(file, options.threads), feed) for step, file in steps.items()}
    elapsed = medians(sides, rounds=options.repeats)
    figures: Figures = {}
    before = "exporter"
    for report in graphs.reports:
        key = f"passes.{name}.{report.name}"
        after = report.name if report.name in graphs.after else before
        figures[f"{key}.speedup"] = elapsed[before].cpu / elapsed[after].cpu
        figures |= {
            f"{key}.rewrites": report.rewrites,
            f"{key}.nodes": report.nodes[1],
            f"{key}.flops": report.flops[1],
        }
        before = after
    return figures


def show(names: list[str], figures: Figures, options: argparse.Namespace) -> None:
    console = Console()
    heading = f"one user, {options.candidates} candidates, threads: {options.threads}; ratios to the exporter's graph"
    columns = ("graph", "side", "ms", "ratio", "CPU ms", "ratio", "off torch", "peak MB")
    table = Table(*columns, title=heading)
    for name in names:
        for side in ("exporter", *OURS, *PEERS):
            if f"ms.{name}.{side}" not in figures:
                continue
            row = []
            for clock in ("ms", "cpu_ms"):
                elapsed, exporter = (_number(figures, f"{clock}.{name}.{which}") for which in (side, "exporter"))
                row += [f"{elapsed:.2f}", f"{exporter / elapsed:.2f}"]
            row.append(f"{figures[f'max_abs_diff.{name}.{side}']:.0e}")
            table.add_row(name, side, *row, _cell(figures, f"peak_memory_mb.{name}.{side}"))
        table.add_section()
    console.print(table)
    passes = Table(
        "graph", "pass", "rewrites", "nodes", "MFLOP", "ratio", title="graph passes; ratio: CPU ms before over after"
    )
    for name in names:
        passes.add_row(name, "", "", *(_cell(figures, f"{what}.{name}.exporter") for what in ("nodes", "flops")), "")
        for key in figures:
            kind, model, *rest = key.split(".")
            if (kind, model, rest[-1:]) == ("passes", name, ["rewrites"]) and figures[key]:
                stem = key.removesuffix(".rewrites")
                cells = [_cell(figures, f"{stem}.{what}") for what in ("rewrites", "nodes", "flops")]
                passes.add_row(name, rest[0], *cells, f"{_number(figures, f'{stem}.speedup'):.2f}")
        passes.add_section()
    console.print(passes)
    for key, value in figures.items():
        if key.startswith("refused."):
            console.print(f"{key.removeprefix('failed.')}: {value}", markup=False)


def _number(figures: Figures, key: str) -> float:
    value = figures[key]
    assert not isinstance(value, str)
    return value


def _cell(figures: Figures, key: str) -> str:
    if key not in figures:
        return ""
    scale = 1e-6 if "flops" in key else 1.0
    return f"{_number(figures, key) * scale:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCH_MODELS), default=list(BENCH_MODELS), metavar="MODEL")
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=100, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime and of torch")
    parser.add_argument("--shrink", type=int, default=1, help="divides the models' widths; to try the benchmark out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes half a minute")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", action="store_true", help="one JSON object after the tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: Figures = {}
    panels: dict[str, Curves] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            found, curves = measure(name, Path(folder) / name, options)
            figures |= found
            if curves:
                panels[PLOTTED[name]] = curves
    show(options.only, figures, options)
    if panels:
        options.plot.write_text(draw(panels))
    if options.json:
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
        print(json.dumps(rounded))


if __name__ == "__main__":
    main()
