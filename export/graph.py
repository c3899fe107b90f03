"""The dense part of a model as an ONNX graph with named inputs, any number of users and candidates."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from export.graph_file import is_large, save_graph
from export.inexpressible import what_cannot_be_expressed
from torchrank.features.schema import FeatureSchema
from torchrank.models.base import RankModel
from torchrank.nn.inputs import ModelInputs

OPSET = 20


def graph_inputs(schema: FeatureSchema) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Input name -> ("user" or "item" rows, the shape behind the rows). An input without columns is left out.

    `user_index` ([N]) and the `.length`s ([rows]) are int64, all else is float32.
    """
    widths = {
        "user_pooled": ("user", sum(slot.dim for slot in schema.user_pooled)),
        "item_pooled": ("item", sum(slot.dim for slot in schema.item_pooled)),
        "user_dense": ("user", len(schema.user_dense)),
        "item_dense": ("item", len(schema.item_dense)),
    }
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (rows, (width,)) for name, (rows, width) in widths.items() if width
    }
    for slot in schema.sequences:
        inputs[slot.name] = (slot.rows, (slot.max_length, slot.dim))
        inputs[f"{slot.name}.length"] = (slot.rows, ())
    inputs["user_index"] = ("item", ())
    return inputs


class DenseGraph(nn.Module):
    """ModelInputs as a flat list of tensors in; probabilities [N], one per task, out."""

    def __init__(self, model: RankModel, schema: FeatureSchema) -> None:
        super().__init__()
        self.model = model
        self.schema = schema
        self.names = list(graph_inputs(schema))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        user_index = given["user_index"]
        users = next((given[n].shape[0] for n, (rows, _) in graph_inputs(self.schema).items() if rows == "user"), 1)
        inputs = ModelInputs(
            user_pooled=given.get("user_pooled", _no_columns(users)),
            item_pooled=given.get("item_pooled", _no_columns(user_index.shape[0])),
            user_dense=given.get("user_dense", _no_columns(users)),
            item_dense=given.get("item_dense", _no_columns(user_index.shape[0])),
            user_index=user_index,
            sequences={slot.name: given[slot.name] for slot in self.schema.sequences},
            lengths={slot.name: given[f"{slot.name}.length"] for slot in self.schema.sequences},
        )
        logits = self.model(inputs)
        return tuple(torch.sigmoid(logits[task]) for task in self.schema.tasks)


def _no_columns(rows: int) -> Tensor:
    return torch.zeros(rows, 0)


def export_graph(model: RankModel, schema: FeatureSchema, path: Path) -> None:
    """Writes the fp32 graph as the exporter gives it. Raises ValueError where it cannot express the model."""
    save_graph(dense_graph(model, schema), path)


def dense_graph(model: RankModel, schema: FeatureSchema) -> onnx.ModelProto:
    """The fp32 graph as the exporter gives it. Raises ValueError where it cannot express the model."""
    inputs = graph_inputs(schema)
    users, items = torch.export.Dim("U", min=1), torch.export.Dim("N", min=1)
    rows = {"user": (3, users), "item": (7, items)}
    examples, shapes = [], []
    for name, (side, rest) in inputs.items():
        count, dimension = rows[side]
        integral = name == "user_index" or name.endswith(".length")
        examples.append(torch.zeros((count, *rest), dtype=torch.int64 if integral else torch.float32))
        shapes.append({0: dimension})
    graph = DenseGraph(model, schema).eval()
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph,
                tuple(examples),
                input_names=list(inputs),
                output_names=list(schema.tasks),
                dynamic_shapes=(tuple(shapes),),
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = what_cannot_be_expressed(error, graph)
            raise ValueError(f"{type(model).__name__} cannot be exported to ONNX: {cause}") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _strip(proto)
    if not is_large(proto):  # the checker takes a larger one only as a file
        onnx.checker.check_model(proto, full_check=True)
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Drops stale shapes, which the exporter's own optimiser leaves, and its notes on torch source lines, which would
    be half of a small model's file."""
    del proto.graph.value_info[:]
    for part in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
    ):
        del part.metadata_props[:]
        part.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its steps and warns of its own internals; a failure still raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
