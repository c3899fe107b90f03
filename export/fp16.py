"""The dense graph in half precision: weights and arithmetic in fp16, and in fp32 what would lose too much there.

One file serves every provider (docs/adr/0014-variants.md): a GPU computes in fp16; ONNX Runtime's CPU provider, which
has hardly any fp16 kernels, casts the weights to fp32 when it loads the graph and computes in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

from export.example_inputs import Feed, in_memory

LARGEST = 65504.0 / 4  # of fp16, with room for inputs larger than the ones that were looked at

# Exponentials, statistics, long sums, divisions; the sigmoids at the end of the graph among them. A matrix product is
# not: GPUs add its terms up in fp32.
SENSITIVE = frozenset(
    ("Softmax", "LogSoftmax", "Softplus", "Sigmoid", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Div", "Erf", "Gelu",
     "LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
     "LpNormalization", "MeanVarianceNormalization", "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1",
     "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "CumSum", "Einsum", "Sum", "Mean",
     "Cast", "CastLike", "Constant", "ConstantOfShape")
)  # fmt: skip


def to_fp16(model: onnx.ModelProto, fp32_nodes: Collection[str] = (), *, emulated: bool = False) -> onnx.ModelProto:
    """`model`, whose floats are fp32, in fp16 but for its inputs and outputs, sensitive ops and `fp32_nodes`.

    emulated: every tensor is fp32 still, but holds what fp16 would: each fp16 result is rounded. A CPU thus tells what
    a GPU would compute.
    """
    return _Halver(model, fp32_nodes, emulated).model()


def beyond_fp16(model: onnx.ModelProto, feeds: Iterable[Feed]) -> tuple[str, ...]:
    """Names of the nodes that read or make values beyond `LARGEST` for these feeds; NaN and infinity are beyond it."""
    types = _element_types(model)
    made = [name for node in model.graph.node for name in node.output if types.get(name) == TensorProto.FLOAT]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in made)
    session = in_memory(watched)
    inputs = [node.name for node in session.get_inputs()]
    large = {tensor.name for tensor in model.graph.initializer if _is_float(tensor) and _large(_array(tensor))}
    for feed in feeds:
        taken = {name: feed[name] for name in inputs}
        values = dict(zip(made, session.run(None, taken), strict=True)) | taken
        large |= {name for name, value in values.items() if value.dtype == np.float32 and _large(value)}
    return tuple(node.name for node in model.graph.node if large & {*node.input, *node.output})


class _Halver:
    """Copies the graph node by node; tensors get their casts where they are first wanted in the other precision."""

    def __init__(self, model: onnx.ModelProto, fp32_nodes: Collection[str], emulated: bool) -> None:
        self._source = model
        self._fp32_nodes = fp32_nodes
        self._emulated = emulated
        self._types = _element_types(model)
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer if _is_float(tensor)}
        self._outputs = {output.name for output in model.graph.output}
        self._half_results: set[str] = set()
        self._nodes: list[onnx.NodeProto] = []
        self._added: dict[tuple[str, bool], str] = {}  # (tensor, in half precision) -> where it is
        self._new_weights: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        for node in self._source.graph.node:
            self._copy(node)
        half = onnx.ModelProto()
        half.CopyFrom(self._source)
        del half.graph.node[:], half.graph.value_info[:]
        half.graph.node.extend(self._nodes)
        half.graph.initializer.extend(self._new_weights)
        read = {name for node in self._nodes for name in node.input} | self._outputs
        kept = [tensor for tensor in half.graph.initializer if tensor.name in read]
        del half.graph.initializer[:]
        half.graph.initializer.extend(kept)
        return half

    def _copy(self, node: onnx.NodeProto) -> None:
        in_half = self._may_be_half(node)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for position, name in enumerate(node.input):
            if self._types.get(name) == TensorProto.FLOAT:
                copy.input[position] = self._wanted(name, in_half)
        self._nodes.append(copy)
        if in_half:
            for name in node.output:
                if self._types.get(name) == TensorProto.FLOAT:
                    self._half_results.add(name)
                    if self._emulated:
                        self._added[name, True] = self._added[name, False] = self._rounded(name)

    def _may_be_half(self, node: onnx.NodeProto) -> bool:
        """A node whose results are outputs of the graph stays fp32, as they do."""
        if node.op_type in SENSITIVE or node.domain or node.name in self._fp32_nodes or {*node.output} & self._outputs:
            return False
        schema = defs.get_schema(node.op_type, self._source.opset_import[0].version)
        accepted = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
        last = len(schema.inputs) - 1  # which may be variadic
        return all(
            "tensor(float16)" in accepted.get(schema.inputs[min(position, last)].type_str, ())
            for position, name in enumerate(node.input)
            if self._types.get(name) == TensorProto.FLOAT
        )

    def _wanted(self, name: str, in_half: bool) -> str:
        """The tensor `name` in that precision."""
        if (name, in_half) in self._added:
            return self._added[name, in_half]
        if in_half == (name in self._half_results):
            return name
        if in_half and name in self._weights:
            added = self._half_weight(name)
        elif in_half and self._emulated:
            added = self._rounded(name)
        else:
            added = self._cast(name, name + (".fp16" if in_half else ".fp32"), in_half)
        self._added[name, in_half] = added
        return added

    def _half_weight(self, name: str) -> str:
        values = _array(self._weights[name]).astype(np.float16)
        if self._emulated:
            values = values.astype(np.float32)
        self._new_weights.append(numpy_helper.from_array(values, f"{name}.fp16"))
        return f"{name}.fp16"

    def _rounded(self, name: str) -> str:
        return self._cast(self._cast(name, f"{name}.fp16", True), f"{name}.rounded", False)

    def _cast(self, source: str, target: str, in_half: bool) -> str:
        to = TensorProto.FLOAT16 if in_half else TensorProto.FLOAT
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"Cast_{target}", to=to))
        return target


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return types | {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}


def _is_float(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_type == TensorProto.FLOAT)


def _array(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor)


def _large(values: np.ndarray) -> bool:
    return not bool((np.abs(values) <= LARGEST).all())  # `not <=` also catches NaN
