"""The int8 graph against its formula in float64, and which kernels ONNX Runtime makes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.example_inputs import in_memory
from export.int8 import matrix_layers, quantize_columns, to_int8, worth_quantizing

IN, OUT, STACK = 48, 96, 3


def layer(kind: str, seed: int) -> tuple[onnx.ModelProto, NDArray[np.float32], NDArray[np.float32]]:
    """x [N, IN] -> y = x W + b, as the exporter or a pass writes it; W [IN, OUT], or [STACK, IN, OUT], and b [OUT]."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    shape = (STACK, IN, OUT) if kind == "stack" else (IN, OUT)
    weight = (rng.standard_normal(shape) * rng.gamma(1, 1, OUT)).astype(np.float32)  # columns of many sizes
    bias = np.zeros(OUT, np.float32) if kind == "no bias" else rng.standard_normal(OUT).astype(np.float32)
    transposed = kind == "Gemm transB"
    constants = [numpy_helper.from_array(np.ascontiguousarray(weight.T) if transposed else weight, "W")]
    constants.append(numpy_helper.from_array(bias, "b"))
    if kind.startswith("Gemm"):
        nodes = [helper.make_node("Gemm", ["x", "W", "b"], ["y"], name="layer", transB=int(transposed))]
    elif kind == "no bias":
        nodes = [helper.make_node("MatMul", ["x", "W"], ["y"], name="layer")]
    else:
        nodes = [
            helper.make_node("MatMul", ["x", "W"], ["m"], name="layer"),
            helper.make_node("Add", ["m", "b"], ["y"], name="add"),
        ]
    return _model(nodes, constants), weight, bias


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", IN])]
    rank = 3 if any(len(c.dims) == 3 for c in constants) else 2
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def kernels(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """What ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("kind", ["Gemm", "Gemm transB", "MatMul Add", "no bias", "stack"])
def test_a_layer_is_its_formula(kind: str, rows: int, tmp_path: Path) -> None:
    proto, weight, bias = layer(kind, seed=rows)
    x = np.random.default_rng(rows + 100).standard_normal((rows, IN)).astype(np.float32)
    quantized = to_int8(proto, matrix_layers(proto))
    onnx.checker.check_model(quantized, full_check=True)
    found = in_memory(quantized).run(None, {"x": x})[0]

    low, high = min(x.min(), 0), max(x.max(), 0)  # as DynamicQuantizeLinear defines it
    scale = np.float32(high - low) / np.float32(255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    x_q = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    w_scale = np.abs(weight.astype(np.float64)).max(axis=-2, keepdims=True) / 63
    expected = (x_q * float(scale)) @ (np.rint(weight / w_scale) * w_scale) + bias
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    exact = x.astype(np.float64) @ weight + bias
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert kernels(quantized, tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_layers_with_one_input_share_its_quantization(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    weights = {name: rng.standard_normal((IN, OUT)).astype(np.float32) for name in ("V", "W")}
    nodes = [helper.make_node("MatMul", ["x", name], [name.lower()], name=name) for name in weights]
    nodes.append(helper.make_node("Add", ["v", "w"], ["y"], name="add"))
    proto = _model(nodes, [numpy_helper.from_array(value, name) for name, value in weights.items()])
    found = kernels(to_int8(proto, matrix_layers(proto)), tmp_path)
    assert found == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2, "Add": 1}
    assert kernels(to_int8(proto, ["W"]), tmp_path) == {"Gemm": 1, "DynamicQuantizeMatMul": 1}  # the sum in the Gemm


def test_a_layer_may_read_what_another_makes() -> None:
    rng = np.random.default_rng(8)
    weights = {name: rng.standard_normal((IN, IN)).astype(np.float32) / 7 for name in ("V", "W")}
    nodes = [
        helper.make_node("MatMul", ["x", "V"], ["v"], name="V"),
        helper.make_node("MatMul", ["v", "W"], ["y"], name="W"),
    ]
    proto = _model(nodes, [numpy_helper.from_array(value, name) for name, value in weights.items()])
    quantized = to_int8(proto, matrix_layers(proto))
    onnx.checker.check_model(quantized, full_check=True)
    x = rng.standard_normal((9, IN)).astype(np.float32)
    expected = x @ weights["V"] @ weights["W"]
    assert np.abs(in_memory(quantized).run(None, {"x": x})[0] - expected).max() < 0.05 * np.abs(expected).max()


def test_two_products_of_any_input_fit_16_bits() -> None:
    """What 8-bit kernels without VNNI add up in; so every host gives the same scores."""
    weight = np.random.default_rng(3).standard_normal((50, 20)).astype(np.float32) * 100
    weight[:, 4] = 0
    values, scale = quantize_columns(weight)
    assert 2 * 255 * int(np.abs(values).max()) <= np.iinfo(np.int16).max
    assert np.abs(values * scale - weight).max() <= np.abs(weight).max() / 63 / 2 + 1e-5
    assert (values[:, 4] == 0).all()
    assert np.isfinite(scale).all()


def test_which_layers_there_are_and_which_are_worth_it() -> None:
    w = numpy_helper.from_array(np.zeros((IN, OUT), np.float32), "W")
    attributes: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Gemm", ["x", "W"], {}),
        ("Gemm", ["x", "W"], {"alpha": 0.5}),
        ("Gemm", ["W", "W"], {"transA": 1}),
        ("MatMul", ["x", "W"], {}),
        ("MatMul", ["W", "x"], {}),
        ("MatMul", ["x", "x"], {}),
    ]
    nodes = [helper.make_node(op, ins, [f"y{n}"], name=str(n), **a) for n, (op, ins, a) in enumerate(attributes)]
    assert matrix_layers(_model(nodes, [w])) == {"0": (IN, OUT), "3": (IN, OUT)}
    assert worth_quantizing((64, 32))
    assert worth_quantizing((8, 256, 32))
    assert not worth_quantizing((31, 64))  # too small
    assert not worth_quantizing((400, 31))  # too narrow
