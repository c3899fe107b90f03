"""The fp16 graph against arithmetic in numpy's half precision and against the fp32 graph; what stays fp32 and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.example_inputs import in_memory
from export.fp16 import LARGEST, beyond_fp16, to_fp16

WIDTH, HIDDEN = 24, 40


def model(nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]], width: int = WIDTH) -> onnx.ModelProto:
    """x [N, width] -> p [N]."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])]
    outputs = [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N"])]
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes)


def gated(seed: int, scale: float = 1.0) -> tuple[onnx.ModelProto, dict[str, NDArray[np.float32]]]:
    """p = sigmoid(Σ softmax(x A) ∘ relu(x A + b)), the relu's input `scale` times as large."""
    rng = np.random.default_rng(seed)
    print(f"seed {seed}")
    weights = {
        "A": (rng.standard_normal((WIDTH, HIDDEN)) / 5).astype(np.float32),
        "b": rng.standard_normal(HIDDEN).astype(np.float32),
        "scale": np.array(scale, np.float32),
        "unscale": np.array(1 / scale, np.float32),
        "axis": np.array([1]),
    }
    nodes = [
        node("MatMul", ["x", "A"], "a"),
        node("Softmax", ["a"], "gate"),
        node("Add", ["a", "b"], "h"),
        node("Mul", ["h", "scale"], "big"),
        node("Relu", ["big"], "r"),
        node("Mul", ["r", "unscale"], "small"),
        node("Mul", ["gate", "small"], "m"),
        node("ReduceSum", ["m", "axis"], "s", keepdims=0),
        node("Sigmoid", ["s"], "p"),
    ]
    return model(nodes, weights), weights


def run(proto: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return in_memory(proto).run(None, {"x": x})[0]


def types_in(proto: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output, *graph.input)}


@pytest.mark.parametrize("seed", range(3))
def test_emulated_is_what_numpy_computes_when_it_rounds_every_half(seed: int) -> None:
    proto, w = gated(seed)
    x = np.random.default_rng(seed + 100).standard_normal((50, WIDTH)).astype(np.float32)

    def half(values: NDArray[np.floating]) -> NDArray[np.float32]:
        return values.astype(np.float16).astype(np.float32)

    a = half(half(x) @ half(w["A"]))
    exponentials = np.exp(a - a.max(axis=1, keepdims=True))
    gate = half(exponentials / exponentials.sum(axis=1, keepdims=True))
    m = half(gate * half(np.maximum(half(a + half(w["b"])), 0)))
    expected = 1 / (1 + np.exp(-m.sum(axis=1)))
    emulated = run(to_fp16(proto, emulated=True), x)
    # A product that lies between two halves may be rounded to either, by the order of its sum.
    np.testing.assert_allclose(emulated, expected, atol=1e-4, rtol=0)
    assert np.median(np.abs(emulated - expected)) < 2e-7
    assert np.abs(emulated - run(proto, x)).max() > 1e-5  # and it is another graph


@pytest.mark.parametrize("seed", range(3))
def test_true_half_arithmetic_stays_near_fp32(seed: int) -> None:
    """The reference evaluator computes in numpy's float16; ONNX Runtime on CPU would not."""
    proto, _ = gated(seed)
    x = np.random.default_rng(seed + 200).standard_normal((50, WIDTH)).astype(np.float32)
    (found,) = ReferenceEvaluator(to_fp16(proto)).run(None, {"x": x})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, run(proto, x), atol=2e-3, rtol=0)


def test_sensitive_ops_and_the_border_are_fp32_all_else_is_half() -> None:
    half = to_fp16(gated(1)[0])
    types = types_in(half)
    for each in half.graph.node:
        wanted = TensorProto.FLOAT if each.op_type in ("Softmax", "ReduceSum", "Sigmoid") else TensorProto.FLOAT16
        if each.op_type != "Cast":
            assert types[each.output[0]] == wanted, each.name
    assert {types["x"], types["p"]} == {TensorProto.FLOAT}
    weights = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert weights == {"axis": 7, **{f"{n}.fp16": 10 for n in ("A", "b", "scale", "unscale")}}
    assert sum(each.op_type == "Cast" for each in half.graph.node) == 4  # x, a to Softmax, gate and m back and forth


def test_what_overflows_fp16_stays_fp32_and_finite() -> None:
    proto, _ = gated(2, scale=1.6e4)  # a weight that fp16 holds, and products that it does not
    x = np.random.default_rng(5).standard_normal((50, WIDTH)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        (overflowed,) = ReferenceEvaluator(to_fp16(proto)).run(None, {"x": x})
    assert np.abs(overflowed - run(proto, x)).max() > 0.1
    kept = beyond_fp16(proto, [{"x": x}])
    assert kept == ("Mul_big", "Relu_r", "Mul_small")
    half = to_fp16(proto, kept)
    (found,) = ReferenceEvaluator(half).run(None, {"x": x})
    np.testing.assert_allclose(found, run(proto, x), atol=2e-3, rtol=0)
    assert types_in(half)["big"] == TensorProto.FLOAT


def test_a_weight_that_fp16_does_not_hold_stays_fp32() -> None:
    proto, weights = gated(2, scale=1e6)
    x = np.zeros((1, WIDTH), np.float32)  # h = b
    kept = beyond_fp16(proto, [{"x": x}])
    assert "Mul_big" in kept
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in to_fp16(proto, kept).graph.initializer}
    assert stored["scale"] == weights["scale"]


def test_range_is_that_of_fp16_with_room_and_nan_is_beyond_it() -> None:
    proto = model([node("Neg", ["x"], "n"), node("ReduceMax", ["n", "axis"], "p", keepdims=0)], {"axis": np.array([1])})
    inside, outside, missing = (np.full((2, WIDTH), v, np.float32) for v in (LARGEST, LARGEST * 1.01, np.nan))
    assert beyond_fp16(proto, [{"x": inside}]) == ()
    for feed in (outside, missing):
        assert beyond_fp16(proto, [{"x": inside}, {"x": feed}]) == ("Neg_n", "ReduceMax_p")
    assert np.finfo(np.float16).max >= LARGEST


def test_on_cpu_the_weights_are_cast_when_the_session_is_made(tmp_path: Any) -> None:
    """In the graph that ONNX Runtime really runs there is no fp16 tensor, and no Cast of a weight."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    proto = to_fp16(gated(1)[0])
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert TensorProto.FLOAT16 not in weights.values()
    for each in graph.node:
        if each.op_type == "Cast":
            assert each.input[0] not in weights
            assert helper.get_attribute_value(each.attribute[0]) == TensorProto.FLOAT
