"""The models of scripts/bench/export.py give torch's scores as graphs; and that benchmark runs, on small ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from export.example_inputs import in_memory
from export.graph import export_graph
from export.optimize import optimize
from export.passes import PASSES
from scripts.bench.export_models import BENCH_MODELS, CrossNet, build, random_request, torch_scores
from scripts.bench.export_plot import CANDIDATES, USERS, Curves, draw
from scripts.bench.export_sides import check
from scripts.bench.export_training import train_briefly

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", BENCH_MODELS)
def test_a_graph_says_what_torch_says(name: str, tmp_path: Path) -> None:
    model, schema = build(name, shrink=8)
    train_briefly(model, schema, steps=60, rows=64)
    export_graph(model, schema, tmp_path / "model.onnx")
    exported = onnx.load(tmp_path / "model.onnx")
    optimised, reports = optimize(exported)
    assert [report.name for report in reports if report.left_out] == []
    for graph in (exported, optimised):
        session = in_memory(graph)
        for seed, (users, candidates) in enumerate([(1, 1), (1, 500), (3, 41), (8, 8), (4, 1000)]):
            print(f"seed {seed}")
            request = random_request(schema, users=users, candidates=candidates, seed=seed, full=seed % 2 == 0)
            taken = {node.name: request[node.name] for node in session.get_inputs()}
            scores = session.run(list(schema.tasks), taken)
            for found, expected in zip(scores, torch_scores(model, schema, request), strict=True):
                assert candidates < 40 or expected.std() > 1e-3
                np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mmoe", "deepfm", "dcnv2"])
def test_the_user_has_62_percent_of_the_columns(name: str) -> None:
    _, schema = build(name)
    user = sum(slot.dim for slot in schema.user_pooled) + len(schema.user_dense)
    item = sum(slot.dim for slot in schema.item_pooled) + len(schema.item_dense)
    assert round(user / (user + item), 2) == 0.62


def test_deepfm_is_the_sum_over_pairs_of_fields() -> None:
    """In float64, pair by pair; the MLP is taken away."""
    model, schema = build("deepfm", shrink=4)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    request = random_request(schema, users=2, candidates=5, seed=3)
    (found,) = torch_scores(model, schema, request)
    rows = np.hstack([request["user_pooled"][request["user_index"]], request["item_pooled"]]).astype(np.float64)
    width = request["user_pooled"].shape[1]
    slots = [(slot, slot.start) for slot in schema.user_pooled]
    slots += [(slot, width + slot.start) for slot in schema.item_pooled]
    fields = [rows[:, start : start + slot.dim] for slot, start in slots if slot.group == "deep"]
    first = sum(rows[:, start] for slot, start in slots if slot.group == "wide")
    second = sum((v * w).sum(axis=1) for f, v in enumerate(fields) for w in fields[:f])
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(first + second))), atol=1e-6)


def test_a_cross_layer_multiplies_with_the_first_input() -> None:
    generator = torch.Generator().manual_seed(5)
    net, x0 = CrossNet(3, 2), torch.randn(4, 3, generator=generator)
    expected = torch.zeros(4, 3)
    for n in range(4):
        x = x0[n]
        for layer in net.layers:
            assert isinstance(layer, torch.nn.Linear)
            x = torch.stack([x0[n, i] * (_dot(layer.weight[i], x) + layer.bias[i]) + x[i] for i in range(3)])
        expected[n] = x
    torch.testing.assert_close(net(x0), expected)


def _dot(one: Tensor, two: Tensor) -> Tensor:
    return torch.stack([a * b for a, b in zip(one, two, strict=True)]).sum()


def test_the_benchmark_runs_and_names_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench/export.py", "--json", "--only", "mmoe", "dcnv2"]
    command += ["--candidates", "20", "--repeats", "3", "--shrink", "4", "--no-compile"]  # layers that int8 takes
    ended = subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    figures = json.loads(ended.stdout.splitlines()[-1])
    for name in ("mmoe", "dcnv2"):
        expected = {f"speedup.{name}_{precision}" for precision in ("fp32", "fp16", "int8")}
        expected |= {f"passes.{name}.{graph_pass.name}.speedup" for graph_pass in PASSES}
        expected |= {f"{what}.{name}.{side}" for what in ("nodes", "flops") for side in ("exporter", "fp32")}
        assert expected | {f"peak_memory_ratio.{name}"} <= figures.keys()
        assert all(figures[key] > 0 for key in expected)
        assert figures[f"max_abs_diff.{name}.fp32"] <= 1e-5
    assert {"mmoe.best_vs_eager", "mmoe.best_vs_torchscript"} <= figures.keys()
    assert "dcnv2.best_vs_eager" not in figures


def test_other_scores_end_the_benchmark() -> None:
    expected = [np.array([0.5, 0.25], np.float32)]
    sides = {side: lambda: [np.array([0.5, 0.255], np.float32)] for side in ("int8", "fp16")}
    assert check("model", {"int8": sides["int8"]}, expected) == {"int8": pytest.approx(0.005)}
    with pytest.raises(SystemExit, match=r"model, fp16: its scores are 0.005 from torch's, more than 0.002"):
        check("model", sides, expected)
    with pytest.raises(SystemExit, match="nan"):
        check("model", {"fp32": lambda: [np.array([np.nan, 0.25], np.float32)]}, expected)


def test_the_plot_has_a_line_for_each_graph_and_number_of_users() -> None:
    curves: Curves = {
        (graph, users): {candidates: candidates * scale for candidates in CANDIDATES if candidates >= users}
        for graph, scale in (("exporter", 0.02), ("fp32", 0.01))
        for users in USERS
    }
    root = ElementTree.fromstring(draw({"one": curves, "<two>": curves}))
    svg = "{http://www.w3.org/2000/svg}"
    assert "<two>" in [text.text for text in root.iter(f"{svg}text")]
    points = [line.attrib["points"].split() for line in root.iter(f"{svg}polyline")]
    assert sorted(len(line) for line in points)[-12:] == sorted([8, 7, 7] * 4)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for x, y in (point.split(",") for line in points for point in line):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
