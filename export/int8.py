"""The dense graph with its matrix products in int8: weights by column, activations when the graph runs.

    x W + b  ≈  s_x · s_W ∘ ((x_q - z_x) W_q) + b      s_x, z_x: of the whole of x, taken at each run
                                                       s_W: one per output column

A weight has 7 bits: the 8-bit kernels of x86 hosts without VNNI add two products up in 16 bits, which 8-bit weights
overflow. So a host of any age gives the scores that the gate saw. ONNX Runtime fuses each product with its scales and
bias into one kernel (DynamicQuantizeMatMul, or MatMulIntegerToFloat where several read one x).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_TOP = 63  # of a weight
MIN_WEIGHTS, MIN_COLUMNS = 2048, 32  # below, quantizing x takes longer than int8 saves (docs/adr/0014-variants.md)


def matrix_layers(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Name of each node that multiplies by a constant matrix (or a stack of them) -> the shape [.., in, out]."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == 1}
    layers = {}
    for node in model.graph.node:
        shape = shapes.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if shape is not None and len(shape) >= 2 and node.input[0] not in shapes and _plain(node):
            layers[node.name] = shape[::-1] if _attributes(node).get("transB") else shape
    return layers


def worth_quantizing(shape: tuple[int, ...]) -> bool:
    return shape[-2] * shape[-1] >= MIN_WEIGHTS and shape[-1] >= MIN_COLUMNS


def to_int8(model: onnx.ModelProto, layers: Collection[str]) -> onnx.ModelProto:
    """`model` with these of its `matrix_layers` in int8; all else stays fp32."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    writer = _Writer()
    for node in model.graph.node:
        if node.name in layers:
            weight = numpy_helper.to_array(weights[node.input[1]])
            if _attributes(node).get("transB"):
                weight = weight.T
            writer.quantized(node, weight)
        else:
            writer.nodes.append(node)
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    del quantized.graph.node[:], quantized.graph.value_info[:], quantized.graph.initializer[:]
    quantized.graph.node.extend(writer.nodes)
    read = {name for node in writer.nodes for name in node.input} | {output.name for output in model.graph.output}
    quantized.graph.initializer.extend(
        tensor for tensor in (*model.graph.initializer, *writer.weights) if tensor.name in read
    )
    return quantized


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._activations: dict[str, list[str]] = {}  # tensor -> its int8 values, scale, zero point
        self._matrices: dict[tuple[str, bool], list[str]] = {}  # (weight, transposed) -> values, zero point, scale

    def quantized(self, node: onnx.NodeProto, weight: NDArray[np.float32]) -> None:
        x, x_scale, x_zero = self._activation(node.input[0])
        w, w_zero, w_scale = self._matrix(node.input[1], bool(_attributes(node).get("transB")), weight)
        result, name = node.output[0], node.name
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        product = f"{result}.product" if bias else result
        # ONNX Runtime knows this very order of operands.
        self._add("MatMulInteger", [x, w, x_zero, w_zero], [f"{result}.int32"], name)
        self._add("Cast", [f"{result}.int32"], [f"{result}.float"], f"{name}.cast", to=TensorProto.FLOAT)
        self._add("Mul", [x_scale, w_scale], [f"{result}.int32.scale"], f"{name}.scale")
        self._add("Mul", [f"{result}.float", f"{result}.int32.scale"], [product], f"{name}.scaled")
        if bias:
            self._add("Add", [product, bias], [result], f"{name}.bias")

    def _activation(self, x: str) -> list[str]:
        if x not in self._activations:
            self._activations[x] = [f"{x}.uint8", f"{x}.uint8.scale", f"{x}.uint8.zero"]
            self._add("DynamicQuantizeLinear", [x], self._activations[x], f"DynamicQuantizeLinear_{x}")
        return self._activations[x]

    def _matrix(self, name: str, transposed: bool, weight: NDArray[np.float32]) -> list[str]:
        key = (name, transposed)
        if key not in self._matrices:
            stem = f"{name}.transposed" if transposed else name
            self._matrices[key] = [f"{stem}.int8", f"{stem}.zero", f"{stem}.scale"]
            values, scale = quantize_columns(weight)
            arrays = (values, np.zeros(scale.shape, np.int8), scale)
            for array, full_name in zip(arrays, self._matrices[key], strict=True):
                self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), full_name))
        return self._matrices[key]

    def _add(self, op: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))


def quantize_columns(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[.., in, out] -> int8 of the same shape and a scale per column: [out], or [.., 1, out] of a stack."""
    largest = np.abs(weight).max(axis=-2, keepdims=True)
    scale = np.where(largest > 0, largest / _TOP, 1).astype(np.float32)
    values = np.clip(np.rint(weight / scale), -_TOP, _TOP).astype(np.int8)
    return values, scale[0] if weight.ndim == 2 else scale


def _plain(node: onnx.NodeProto) -> bool:
    attributes = _attributes(node)
    return not attributes.get("transA") and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
