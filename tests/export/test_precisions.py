"""Variants of an exported run: their gates, measured anew from the files; and which layers int8 gives back to fp32."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.metrics import roc_auc_score

import export.build
import export.precisions
import export.validation
from export.build import ExportOptions, export_run
from export.bundle import InvalidBundle, Manifest, read_manifest, sha256
from export.bundle_lookup import BundleLookup
from export.example_inputs import in_memory
from export.int8 import matrix_layers, to_int8
from export.precisions import AUC_GATE, NoVariant, VariantMaker
from export.session import Scorer
from export.validation import Rows
from export.variants import RunFailed, medians_ms
from torchrank.features.transform import FeatureTransform
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run


def export_tiny(run: Path, folder: Path, told: list[str], **options: Any) -> Manifest:
    quiet_libraries()
    return export_run(Run(run), folder, ExportOptions(fp16=True, int8=True, **options), told.append)


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("variants") / "bundle"
    # --force: of 1,500 validation rows, one pair in ten thousand may well change places
    return folder, export_tiny(tiny_run, folder, [], force=True)


def served(folder: Path, manifest: Manifest, variant: str, data: Path) -> tuple[dict, dict]:
    """Labels and scores of the validation file, per task, through the service's own scorer."""
    table = pq.read_table(data / "valid.parquet").combine_chunks()
    labels = {task: table[task].to_numpy() for task in manifest.schema.tasks}
    transform = FeatureTransform(manifest.features)
    parts: dict[str, list[NDArray[np.float32]]] = {task: [] for task in labels}
    with BundleLookup(folder, manifest) as lookup:
        scorer = Scorer(folder, lookup, variant=variant)
        for batch in table.to_batches(max_chunksize=512):
            for task, scores in scorer.score(transform.from_arrow(batch, request_column="request_id")).tasks.items():
                parts[task].append(scores)
    return labels, {task: np.concatenate(scores) for task, scores in parts.items()}


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_aucs_are_those_of_the_validation_file(exported: tuple[Path, Manifest], name: str, tiny_data: Path) -> None:
    folder, manifest = exported
    variant, validation = manifest.variant(name), manifest.validation
    assert validation is not None
    assert (validation.split, validation.rows) == ("valid", 1500)
    labels, scores = served(folder, manifest, name, tiny_data)
    for task in manifest.schema.tasks:
        auc = roc_auc_score(labels[task], scores[task])
        if name == "fp32":
            assert auc == pytest.approx(validation.auc[task], abs=1e-9)
            assert variant.auc_diff == {}
        elif name == "int8":
            assert auc - validation.auc[task] == pytest.approx(variant.auc_diff[task], abs=1e-9)
        else:  # the manifest has what a GPU gives, where that is worse
            assert abs(auc - validation.auc[task]) <= abs(variant.auc_diff[task]) + 1e-9


def test_the_manifest_says_what_each_variant_is(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    assert read_manifest(folder) == manifest
    assert [variant.name for variant in manifest.variants] == ["fp32", "fp16", "int8"]
    assert manifest.variants_left_out == {}
    fp32, fp16, int8 = manifest.variants
    assert [fp32.auc_gate, fp16.auc_gate, int8.auc_gate] == [None, 1e-4, 5e-4]
    for variant in manifest.variants:
        path = folder / variant.file
        assert (variant.sha256, variant.bytes) == (sha256(path), path.stat().st_size)
        assert variant.latency_ms is not None
        assert variant.latency_ms > 0
        gate = variant.auc_gate
        assert variant.passed == all(gate is not None and abs(d) <= gate for d in variant.auc_diff.values())
    assert fp16.bytes < 0.6 * fp32.bytes
    graph = onnx.load(folder / int8.file).graph
    quantized = [node.name for node in graph.node if node.op_type == "MatMulInteger"]
    assert quantized
    layers = matrix_layers(onnx.load(folder / fp32.file))
    assert sorted([*quantized, *int8.fp32_nodes]) == sorted(layers)
    assert int8.bytes < 0.6 * fp32.bytes


def test_a_variant_over_its_gate_is_not_written_and_the_manifest_says_so(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.precisions, "AUC_GATE", {"fp16": 0.0, "int8": 1.0})
    told: list[str] = []
    manifest = export_tiny(tiny_run, tmp_path / "bundle", told)
    assert [variant.name for variant in manifest.variants] == ["fp32", "int8"]
    reason = manifest.variants_left_out["fp16"]
    assert reason.startswith("AUC of ")
    assert reason.endswith("the gate is 0")
    assert f"fp16 is left out: {reason}" in told
    assert sorted(path.name for path in (tmp_path / "bundle").glob("*.onnx")) == ["model.int8.onnx", "model.onnx"]
    assert read_manifest(tmp_path / "bundle") == manifest

    forced = export_tiny(tiny_run, tmp_path / "forced", told, force=True)
    assert [(v.name, v.passed) for v in forced.variants] == [("fp32", True), ("fp16", False), ("int8", True)]
    assert (tmp_path / "forced" / "model.fp16.onnx").is_file()
    assert any(line.startswith("fp16 is written in spite of its gate (--force): AUC of ") for line in told)


def test_validation_rows_are_limited_in_number_and_memory(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"force": True, "validation_rows": 600}
    validation = export_tiny(tiny_run, tmp_path / "some", [], **options).validation
    assert validation is not None
    assert validation.rows == 1024  # two batches of 512
    monkeypatch.setattr(export.validation, "MOST_BYTES", 1)
    validation = export_tiny(tiny_run, tmp_path / "few", [], **options).validation
    assert validation is not None
    assert validation.rows == 512


WIDTH, HIDDEN = 64, 64


def two_layers(seed: int) -> tuple[onnx.ModelProto, NDArray[np.float32]]:
    """p = sigmoid((x B + y G F) w): a column of x is a thousand times as large as the others, and B does not read it.
    int8 has one scale for all of x, so that B's product loses what matters, and G's and F's do not."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4000, WIDTH)).astype(np.float32)
    y = rng.standard_normal((4000, WIDTH)).astype(np.float32)
    x[:, 0] *= 1000
    bad = (rng.standard_normal((WIDTH, HIDDEN)) / 8).astype(np.float32)
    bad[0] = 0
    weights = {"bad": bad}
    weights |= {name: (rng.standard_normal((WIDTH, HIDDEN)) / 8).astype(np.float32) for name in ("good", "fine")}
    weights["w"] = (rng.standard_normal(HIDDEN) / 4).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "bad"], ["a"], name="bad"),
        helper.make_node("MatMul", ["y", "good"], ["b"], name="good"),
        helper.make_node("MatMul", ["b", "fine"], ["c"], name="fine"),
        helper.make_node("Add", ["a", "c"], ["s"], name="sum"),
        helper.make_node("MatMul", ["s", "w"], ["logit"], name="last"),
        helper.make_node("Sigmoid", ["logit"], ["p"], name="sigmoid"),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", WIDTH]) for n in ("x", "y")]
    outputs = [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N"])]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model, np.stack([x, y])


def rows_of(model: onnx.ModelProto, values: NDArray[np.float32], seed: int) -> tuple[Rows, Rows]:
    """Validation rows with labels drawn from the model's own scores, and a few as golden ones."""
    session = in_memory(model)
    feeds = [{"x": x, "y": y} for x, y in zip(*(np.split(v, 20) for v in values), strict=True)]
    scores = np.concatenate([session.run(["p"], feed)[0] for feed in feeds])
    labels = (np.random.default_rng(seed).random(len(scores)) < scores).astype(np.float32)
    return Rows(feeds, {"p": labels}), Rows(feeds[:2], {"p": scores[:400]})


@pytest.mark.parametrize("seed", range(3))
def test_int8_gives_back_the_layer_that_spoils_the_scores_and_only_that(seed: int) -> None:
    model, values = two_layers(seed)
    validation, golden = rows_of(model, values, seed)
    maker = VariantMaker(model, validation, golden, tolerance=lambda name: 0.05)

    def change(layers: list[str]) -> float:
        found = validation.scores(in_memory(to_int8(model, layers)))["p"]
        return abs(roc_auc_score(validation.wanted["p"], found) - maker.auc["p"])

    assert change(["bad", "good", "fine"]) > AUC_GATE["int8"] >= change(["good", "fine"])
    made = maker.make("int8")
    assert made.misfit is None
    assert made.fp32_nodes == ("bad",)
    assert abs(made.auc_diff["p"]) == pytest.approx(change(["good", "fine"]), abs=1e-9)
    kinds = {node.name: node.op_type for node in made.graph.graph.node}
    assert (kinds["bad"], kinds["good"], kinds["fine"]) == ("MatMul", "MatMulInteger", "MatMulInteger")


def test_int8_where_no_layer_keeps_the_gate_or_none_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = two_layers(1)
    validation, golden = rows_of(model, values, 1)
    monkeypatch.setattr(export.precisions, "AUC_GATE", {"int8": 0.0})
    made = VariantMaker(model, validation, golden, tolerance=lambda name: 0.05).make("int8")
    assert made.misfit is not None
    assert made.misfit.endswith("the gate is 0, and no choice of fewer layers keeps the gates")
    assert made.fp32_nodes == ()
    monkeypatch.setattr(export.precisions, "worth_quantizing", lambda shape: False)
    with pytest.raises(NoVariant, match="no matrix of the graph is large enough to gain by it"):
        VariantMaker(model, validation, golden, tolerance=lambda name: 0.05).make("int8")


def test_golden_scores_have_a_gate_too() -> None:
    model, values = two_layers(2)
    validation, golden = rows_of(model, values, 2)
    made = VariantMaker(model, validation, golden, tolerance=lambda name: 1e-9).make("fp16")
    assert made.misfit is not None
    assert made.misfit.startswith("a golden score differs from the trainer's by ")
    assert made.misfit.endswith("; the gate is 1e-09")


def test_int8_gives_back_the_layer_that_makes_no_numbers() -> None:
    """The whole range of x is beyond fp32, so that its scale is infinite."""
    model, values = two_layers(0)
    values[0, ::2, 0], values[0, 1::2, 0] = 3e38, -3e38
    validation, golden = rows_of(model, values, 0)
    assert np.isfinite(golden.wanted["p"]).all()
    maker = VariantMaker(model, validation, golden, tolerance=lambda name: 0.05)
    assert not np.isfinite(validation.scores(in_memory(to_int8(model, ["bad"])))["p"]).any()
    made = maker.make("int8")
    assert (made.misfit, made.fp32_nodes) == (None, ("bad",))


def test_scores_that_are_no_numbers_are_no_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = two_layers(0)
    values[0, ::2, 0], values[0, 1::2, 0] = 3e38, -3e38
    validation, golden = rows_of(model, values, 0)
    monkeypatch.setattr(export.precisions, "worth_quantizing", lambda shape: shape == (WIDTH, HIDDEN))
    monkeypatch.setattr(export.precisions, "matrix_layers", lambda model: {"bad": (WIDTH, HIDDEN)})
    with pytest.raises(NoVariant, match="its scores are not all numbers, and no choice of fewer layers keeps the gat"):
        VariantMaker(model, validation, golden, tolerance=lambda name: 0.05).make("int8")


def with_branches(model: onnx.ModelProto) -> onnx.ModelProto:
    """`sum` becomes an If whose branches, as torch.cond writes them, read tensors of the graph around it."""
    (place,) = (number for number, node in enumerate(model.graph.node) if node.name == "sum")

    def branch(op: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"s.{op}", TensorProto.FLOAT, ["N", HIDDEN])
        return helper.make_graph([helper.make_node(op, ["a", "c"], [f"s.{op}"], name=op)], op, [], [output])

    choice = helper.make_node("If", ["yes"], ["s"], name="sum", then_branch=branch("Add"), else_branch=branch("Sub"))
    model.graph.node[place].CopyFrom(choice)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    onnx.checker.check_model(model, full_check=True)
    return model


def test_a_variant_that_cannot_be_made_is_none() -> None:
    model, values = two_layers(0)
    model = with_branches(model)
    validation, golden = rows_of(model, values, 0)
    with pytest.raises(NoVariant, match=r"^it cannot be made: [A-Z][a-zA-Z]+: .*[Tt]ype"):
        VariantMaker(model, validation, golden, tolerance=lambda name: 0.05).make("fp16")


def test_a_variant_whose_file_is_not_its_graph_is_left_out(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16's file has other weights, int8's cannot be loaded."""
    monkeypatch.setattr(export.precisions, "AUC_GATE", {"fp16": 1.0, "int8": 1.0})
    save = export.build.save_graph

    def save_other(graph: onnx.ModelProto, path: Path, largest: int) -> None:
        if path.name == "model.fp16.onnx":
            for tensor in graph.graph.initializer:
                if tensor.data_type == TensorProto.FLOAT16:
                    values = numpy_helper.to_array(tensor) * np.float16(1.5)
                    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        if path.name == "model.int8.onnx":
            graph.graph.node[0].op_type = "Unheard"
        save(graph, path, largest)

    monkeypatch.setattr(export.build, "save_graph", save_other)
    told: list[str] = []
    manifest = export_tiny(tiny_run, tmp_path / "bundle", told)
    assert [variant.name for variant in manifest.variants] == ["fp32"]
    left_out = manifest.variants_left_out
    assert re.fullmatch(r"a golden score of its file differs from .* by \S+; the gate is 0.002", left_out["fp16"])
    assert left_out["int8"].startswith("its file does not run: ")
    assert "Unheard" in left_out["int8"]
    assert [f"{name} is left out: {reason}" for name, reason in left_out.items()] == [
        line for line in told if " is left out: " in line
    ]
    assert [path.name for path in (tmp_path / "bundle").glob("*.onnx*")] == ["model.onnx"]
    assert read_manifest(tmp_path / "bundle") == manifest


def test_a_variant_that_fails_at_a_request_of_the_usual_size_is_left_out(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Callable[[dict[str, ort.InferenceSession]], dict[str, float]]:
        def time(sessions: dict[str, ort.InferenceSession]) -> dict[str, float]:
            if name in sessions:
                raise RunFailed(name, RuntimeError("out of memory"))
            return medians_ms(sessions)

        return time

    monkeypatch.setattr(export.build, "medians_ms", fail("int8"))
    manifest = export_tiny(tiny_run, tmp_path / "bundle", [], force=True)
    assert [variant.name for variant in manifest.variants] == ["fp32", "fp16"]
    assert all(variant.latency_ms for variant in manifest.variants)
    assert manifest.variants_left_out == {"int8": "a request of 500 candidates fails: out of memory"}
    assert not (tmp_path / "bundle" / "model.int8.onnx").exists()
    monkeypatch.setattr(export.build, "medians_ms", fail("fp32"))
    with pytest.raises(InvalidBundle, match="a request of 500 candidates fails"):
        export_tiny(tiny_run, tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


def test_fp16_names_the_nodes_whose_values_it_does_not_hold() -> None:
    model, values = two_layers(0)
    values[0, :, 0] *= 100  # up to some 4e5
    validation, golden = rows_of(model, values, 0)
    made = VariantMaker(model, validation, golden, tolerance=lambda name: 2e-3).make("fp16")
    assert made.fp32_nodes == ("bad",)
    assert made.misfit is None


def test_a_graph_of_two_files_loads_and_is_hashed_whole(tiny_run: Path, tmp_path: Path) -> None:
    """As one over 2 GiB would be written, by a lower limit."""
    told: list[str] = []
    manifest = export_tiny(tiny_run, tmp_path / "bundle", told, largest_message=10_000)
    one, two = (tmp_path / "bundle" / name for name in ("model.onnx", "model.onnx.data"))
    assert one.stat().st_size < 100_000 < two.stat().st_size
    (variant,) = manifest.variants
    assert variant.bytes == one.stat().st_size + two.stat().st_size
    (tmp_path / "both").write_bytes(one.read_bytes() + two.read_bytes())
    assert variant.sha256 == sha256(tmp_path / "both")
    assert manifest.variants_left_out == dict.fromkeys(("fp16", "int8"), "the graph is too large")
    assert manifest.passes == ()
    assert "the graph's weights have more than 10,000 bytes: no passes, no variants" in told
    assert variant.max_abs_diff <= 1e-5  # the parity gate has loaded it
    ort.InferenceSession(one, providers=["CPUExecutionProvider"])


def test_a_graph_too_large_for_passes_has_variants(tiny_run: Path, tmp_path: Path) -> None:
    told: list[str] = []
    manifest = export_tiny(tiny_run, tmp_path / "bundle", told, largest_optimized=10_000, force=True, report=True)
    assert manifest.passes == ()
    assert [variant.name for variant in manifest.variants] == ["fp32", "fp16", "int8"]
    assert any(line.startswith("the graph's weights have more than 10,000 bytes: no passes, which") for line in told)
    assert not any("no variants" in line for line in told)
