"""Graph passes within an export: what they did is in the manifest, and one that fails costs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from export.build import ExportOptions, export_run
from export.bundle import Manifest, read_manifest
from export.passes import PASSES, GraphPass
from torchrank.cli import cli
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run


def double_negation(model: ir.Model) -> int:
    """Of every Relu's input: more nodes, the same scores."""
    relus = [node for node in model.graph if node.op_type == "Relu"]
    for relu in relus:
        once = ir.node("Neg", [relu.inputs[0]])
        twice = ir.node("Neg", [once.outputs[0]])
        relu.replace_input_with(0, twice.outputs[0])
        model.graph.insert_before(relu, [once, twice])
    return len(relus)


def without_relu(model: ir.Model) -> int:
    relus = [node for node in model.graph if node.op_type == "Relu"]
    for relu in relus:
        relu.outputs[0].replace_all_uses_with(relu.inputs[0])
    return len(relus)


def raises(model: ir.Model) -> int:
    without_relu(model)  # what it has changed by then is not kept
    raise RuntimeError("no such shape")


def invalid(model: ir.Model) -> int:
    next(node for node in model.graph if node.op_type == "Relu").op_type = "NoSuchOp"
    return 1


def not_a_number(model: ir.Model) -> int:
    weight = next(value for value in model.graph.initializers.values() if len(value.shape or ()) == 2)
    assert weight.const_value is not None
    weight.const_value = ir.tensor(np.full_like(weight.const_value.numpy(), np.nan), name=weight.name)
    return 1


INJECTED = tuple(
    GraphPass(function.__name__.replace("_", "-"), function)
    for function in (without_relu, raises, double_negation, invalid, not_a_number)
)


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, list[str]]:
    quiet_libraries()
    folder, told = tmp_path_factory.mktemp("bundles") / "bundle", list[str]()
    manifest = export_run(Run(tiny_run), folder, ExportOptions(passes=INJECTED), told.append)
    return folder, manifest, told


def test_a_pass_that_fails_is_left_out_told_and_reported(exported: tuple[Path, Manifest, list[str]]) -> None:
    folder, manifest, told = exported
    assert read_manifest(folder).passes == manifest.passes
    reports = {report.name: report for report in manifest.passes}
    assert list(reports) == [graph_pass.name for graph_pass in INJECTED]
    expected: dict[str, Callable[[str], bool]] = {
        "without-relu": lambda reason: reason.startswith("its graph's scores of click differ by up to 0."),
        "raises": lambda reason: reason == "RuntimeError: no such shape",
        "invalid": lambda reason: "NoSuchOp" in reason,
        "not-a-number": lambda reason: reason.startswith("its graph's scores of click differ by up to nan"),
    }
    for name, fits in expected.items():
        reason = reports[name].left_out
        assert reason is not None
        assert fits(reason), reason
        assert reports[name].rewrites == 0
        assert reports[name].nodes[0] == reports[name].nodes[1]
        assert f"pass {name} is left out: {reason}" in told


def test_the_bundles_graph_is_the_one_behind_the_passes(exported: tuple[Path, Manifest, list[str]]) -> None:
    folder, manifest, _ = exported
    report = next(report for report in manifest.passes if report.name == "double-negation")
    nodes = onnx.load(folder / "model.onnx").graph.node
    assert report.left_out is None
    assert report.rewrites > 0
    assert report.nodes[1] == report.nodes[0] + 2 * report.rewrites == len(nodes)
    assert sum(node.op_type == "Neg" for node in nodes) == 2 * report.rewrites
    assert report.flops[1] > report.flops[0] > 0
    assert min(report.latency_ms) > 0
    assert manifest.variant("fp32").max_abs_diff <= 1e-5


def test_without_leaves_a_pass_out(tiny_run: Path, tmp_path: Path) -> None:
    quiet_libraries()
    told: list[str] = []
    options = ExportOptions(passes=INJECTED[2:3], without=("double-negation",))
    manifest = export_run(Run(tiny_run), tmp_path / "bundle", options, told.append)
    assert [report.left_out for report in manifest.passes] == ["switched off"]
    assert "pass double-negation is left out: switched off" in told
    assert not any(node.op_type == "Neg" for node in onnx.load(tmp_path / "bundle" / "model.onnx").graph.node)


def test_a_pass_that_there_is_not_is_refused_before_anything_is_written(tiny_run: Path, tmp_path: Path) -> None:
    arguments = ["export", "--run", str(tiny_run), "--output", str(tmp_path / "bundle"), "--without", "none-such"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    names = ", ".join(graph_pass.name for graph_pass in PASSES) or "none"
    assert result.output == f"Error: there is no graph pass 'none-such'; there are: {names}\n"
    assert not list(tmp_path.iterdir())
