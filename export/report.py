"""`report.html` of a bundle: what the passes and variants gained and cost, at a glance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from embedding_store.lookup import EmbeddingLookup
from export.bundle import Golden, Manifest, PassReport, Variant
from export.html_elements import Html, element, join, table
from export.parity import compared
from export.report_page import page, tile, with_bar

_DECADES = range(-9, 0)  # of a difference between probabilities
Numbers = NDArray[np.float64]


def write_report(folder: Path, manifest: Manifest, golden: Sequence[Golden], lookup: EmbeddingLookup) -> None:
    differences = {
        variant.name: np.array([row.difference for row in compared(folder, manifest, variant.name, golden, lookup)])
        for variant in manifest.variants
    }
    graph = onnx.load(folder / manifest.variants[0].file, load_external_data=False).graph
    (folder / "report.html").write_text(report_html(manifest, differences, graph.input), encoding="utf-8")


def report_html(manifest: Manifest, differences: Mapping[str, Numbers], inputs: Iterable[onnx.ValueInfoProto]) -> str:
    """`differences`: per variant |score - trainer's| of all golden rows and tasks. `inputs`: of the fp32 graph."""
    return page(
        f"{manifest.release}: export report",
        _head(manifest),
        _passes(manifest.passes),
        _variants(manifest),
        _parity(manifest, differences),
        _inputs(inputs),
        _tables(manifest),
    )


def _head(manifest: Manifest) -> Html:
    fastest = min(manifest.variants, key=lambda variant: variant.latency_ms or math.inf)
    smallest = min(manifest.variants, key=lambda variant: variant.bytes)
    tiles = [
        tile(_ms(fastest.latency_ms), f"fastest variant, {fastest.name}: 1 user, 500 candidates, one thread"),
        tile(_bytes(smallest.bytes), f"smallest dense graph, {smallest.name}"),
        tile(f"{manifest.variants[0].max_abs_diff:.1e}", "fp32 against the trainer, at most, of a probability"),
    ]
    ran = [report for report in manifest.passes if report.left_out is None]
    if ran:
        first, last = manifest.passes[0], manifest.passes[-1]
        tiles.insert(0, tile(f"{first.latency_ms[0] / last.latency_ms[1]:.2f} ×", "speed-up by the passes, fp32"))
        tiles.insert(1, tile(f"{_share(last.flops[1], first.flops[0]):.0%}", "of the FLOPs are left behind the passes"))
    about = (
        f"Written {manifest.created} by torchrank {manifest.torchrank_version}; opset {manifest.opset}; "
        f"tasks {', '.join(manifest.schema.tasks)}. Latencies are medians on the exporting host."
    )
    return join(element("h1", manifest.release), element("p", about), element("div", *tiles, class_="tiles"))


def _passes(reports: tuple[PassReport, ...]) -> Html:
    title = element("h2", "Graph passes")
    if not reports:
        return join(title, element("p", "None was run: the graph is as the exporter gave it."))
    first = reports[0]
    rows: list[list[object]] = [
        [
            "as exported",
            "",
            first.nodes[0],
            with_bar(_flops(first.flops[0]), 1),
            with_bar(_ms(first.latency_ms[0]), 1),
            "",
        ]
    ]
    for report in reports:
        what: object = f"{report.rewrites} rewrites" if report.rewrites else "found nothing"
        if report.left_out is not None:
            kind = "soft" if report.left_out == "switched off" else "bad"
            what = join(element("span", "left out", class_=kind), f": {report.left_out}")
        rows.append(
            [
                element("code", report.name),
                what,
                report.nodes[1],
                with_bar(_flops(report.flops[1]), _share(report.flops[1], first.flops[0])),
                with_bar(_ms(report.latency_ms[1]), _share(report.latency_ms[1], first.latency_ms[0])),
                f"{report.max_abs_diff:.1e}" if report.max_abs_diff else "0" if report.rewrites else "",
            ]
        )
    head: list[object] = ["after", "", "nodes", "FLOPs", "latency", "largest difference"]
    note = "Each is proven on random inputs before the next; 1 user, 500 candidates, fp32, one thread."
    return join(title, element("p", note), table(head, rows, frozenset((2, 3, 4, 5))))


def _variants(manifest: Manifest) -> Html:
    slowest = max((variant.latency_ms or 0) for variant in manifest.variants)
    largest = max(variant.bytes for variant in manifest.variants)
    rows: list[list[object]] = [
        [
            element("code", variant.name),
            _verdict(variant),
            with_bar(_bytes(variant.bytes), _share(variant.bytes, largest)),
            with_bar(_ms(variant.latency_ms), _share(variant.latency_ms or 0, slowest)),
            _auc(manifest, variant),
            element("div", f"{variant.max_abs_diff:.1e} of {variant.tolerance:g}"),
            _kept(variant),
        ]
        for variant in manifest.variants
    ]
    rows += [
        [element("code", name), join(element("span", "left out", class_="bad"), f": {reason}"), "", "", "", "", ""]
        for name, reason in manifest.variants_left_out.items()
    ]
    head: list[object] = ["variant", "gates", "size", "latency", "AUC", "parity", "kept in fp32"]
    seen = manifest.validation
    note = f"AUC on {seen.rows:,} rows of the {seen.split} data. " if seen else ""
    note += "Parity is the largest difference from the trainer's scores of the golden rows, and its gate."
    return join(element("h2", "Variants"), element("p", note), table(head, rows, frozenset((2, 3))))


def _verdict(variant: Variant) -> Html:
    if variant.passed:
        return element("span", "passed", class_="good")
    return element("span", "over a gate, written by --force", class_="bad")


def _auc(manifest: Manifest, variant: Variant) -> Html:
    """fp32's own, and the others' difference from it."""
    if variant.auc_gate is None:
        values = manifest.validation.auc if manifest.validation else {}
        return join(*(element("div", f"{task} {value:.5f}") for task, value in values.items()))
    lines = [
        element("div", f"{task} {value:+.1e}", class_="bad" if abs(value) > variant.auc_gate else None)
        for task, value in variant.auc_diff.items()
    ]
    return join(*lines, element("div", f"gate ± {variant.auc_gate:g}", class_="soft"))


def _kept(variant: Variant) -> Html:
    if not variant.fp32_nodes:
        return element("span", "all" if variant.name == "fp32" else "none", class_="soft")
    names = element("code", ", ".join(variant.fp32_nodes))
    return element("details", element("summary", f"{len(variant.fp32_nodes)} nodes"), names)


def _parity(manifest: Manifest, differences: Mapping[str, Numbers]) -> Html:
    note = (
        f"How many of the scores of {manifest.golden_rows} golden rows differ from the trainer's by how much; "
        "the line is the gate."
    )
    figures = [_histogram(variant, differences[variant.name]) for variant in manifest.variants]
    return join(element("h2", "Parity"), element("p", note), element("div", *figures, class_="figures"))


def decades(differences: Numbers) -> list[int]:
    """How many are below 1e-9, in [1e-9, 1e-8), …, from 1e-1 on."""
    edges = [0.0, *(10.0**exponent for exponent in _DECADES), np.inf]
    return [int(count) for count in np.histogram(differences, edges)[0]]


def _histogram(variant: Variant, differences: Numbers) -> Html:
    counts = decades(differences)
    width, height, base = 30, 90, 106
    highest = max(counts) or 1
    parts: list[Html] = []
    for number, count in enumerate(counts):
        tall = round(height * count / highest, 1) if count else 0
        left = number * width
        over = number > 0 and 10.0 ** _DECADES[number - 1] >= variant.tolerance
        parts.append(
            element("rect", x=left + 3, y=base - tall, width=width - 6, height=tall, class_="over" if over else "count")
        )
        if count:
            parts.append(element("text", count, x=left + width / 2, y=base - tall - 3, text_anchor="middle"))
        if number:
            parts.append(element("text", f"1e{_DECADES[number - 1]}", x=left, y=base + 14, text_anchor="middle"))
    end = len(counts) * width
    gate = (math.log10(variant.tolerance) - _DECADES[0] + 1) * width
    parts.append(element("line", x1=0, x2=end, y1=base, y2=base, class_="axis"))
    parts.append(element("line", x1=gate, x2=gate, y1=0, y2=base, class_="limit"))
    label = f"{variant.name}: {len(differences)} scores by their difference"
    drawing = element("svg", *parts, viewBox=f"-16 -4 {end + 32} {base + 24}", role="img", aria_label=label)
    caption = element("figcaption", element("b", variant.name), f", at most {variant.max_abs_diff:.1e}")
    return element("figure", caption, drawing)


def _inputs(inputs: Iterable[onnx.ValueInfoProto]) -> Html:
    rows: list[list[object]] = []
    for value in inputs:
        kind = value.type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        row = "one row per user" if shape[0] == "U" else "one row per candidate"
        rows.append(
            [
                element("code", value.name),
                f"[{', '.join(map(str, shape))}]",
                onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
                row,
            ]
        )
    note = "U users (requests) and N candidates of one run; outputs are one probability per task, float32 [N]."
    return join(
        element("h2", "Inputs of the graph"), element("p", note), table(["name", "shape", "type", "rows"], rows)
    )


def _tables(manifest: Manifest) -> Html:
    rows: list[list[object]] = [
        [element("code", t.name), f"{t.rows:,}", t.dim, t.codec, _bytes(t.bytes)] for t in manifest.tables
    ]
    head: list[object] = ["table", "rows", "dim", "codec", "size"]
    return join(element("h2", "Embedding tables"), table(head, rows, frozenset((1, 2, 4))))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


def _bytes(count: int) -> str:
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def _flops(count: int) -> str:
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def _scaled(count: float, units: Sequence[str]) -> str:
    number = 0
    while count >= 1000 and number < len(units) - 1:
        count, number = count / 1000, number + 1
    return f"{count:.3g} {units[number]}"
