"""What every ranking model of conf/model keeps, on every shape of schema it may meet.

A new YAML there is found and goes through all of it. U users, N candidates, D dim, T time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from export.example_inputs import in_memory
from export.fp16 import to_fp16
from export.graph import dense_graph, graph_inputs
from export.int8 import matrix_layers, to_int8
from export.optimize import optimize
from torchrank.config_dir import config_dir
from torchrank.features.schema import FeatureSchema
from torchrank.models import ModelInputs, RankModel
from torchrank.training.config import Config, DataConfig
from torchrank.training.module import build_model, feature_schema

MODELS = sorted((config_dir() / "model").glob("*.yaml"))

COLUMNS = {
    "user": {"side": "user", "type": "string"},
    "age": {"side": "user", "type": "float32"},
    "history": {"side": "user", "type": "list<string>"},
    "hour": {"side": "context", "type": "int64"},
    "item": {"side": "item", "type": "string"},
    "similar": {"side": "item", "type": "list<string>"},
    "tags": {"side": "item", "type": "list<string>"},
    "price": {"side": "item", "type": "float32"},
    "length": {"side": "item", "type": "float32"},
}
FEATURES = {
    "user": {"op": "id", "buckets": 50},
    "age": {"op": "raw"},
    "history": {"op": "last_k", "buckets": 90, "table": "item", "max_length": 5},
    "hour": {"op": "id", "num_embeddings": 24, "dim": 4},
    "item": {"op": "id", "buckets": 90},
    "similar": {"op": "last_k", "buckets": 30, "max_length": 3, "dim": 4},
    "tags": {"op": "id", "buckets": 20, "pooling": "mean"},
    "price": {"op": "raw"},
    "length": {"op": "raw"},
}
TWO = ("click", "finish")
# name: features, tasks
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "everything": (tuple(FEATURES), TWO),
    "one task": (tuple(FEATURES), ("click",)),
    "no user side": (("item", "similar", "tags", "price"), TWO),
    "no dense": (("user", "history", "hour", "item", "tags"), TWO),
    "no sequences": (("user", "age", "hour", "item", "tags", "price"), TWO),
    "no embeddings": (("age", "price", "length"), TWO),
    "user embeddings only": (("user", "hour"), ("click",)),
}


def build(path: Path, shape: str, **overrides: Any) -> tuple[RankModel, FeatureSchema]:
    names, tasks = SHAPES[shape]
    features = [{"name": name, "inputs": [name], **FEATURES[name]} for name in names]
    spec = {"embedding_dim": 8, "columns": {name: COLUMNS[name] for name in names}, "features": features}
    model = {**OmegaConf.to_container(OmegaConf.load(path)), **overrides}  # type: ignore[dict-item]
    data = DataConfig(name="hand-made", path="", train={}, labels=list(tasks), features=spec)
    config = Config(model=model, data=data, seed=3)
    schema = feature_schema(config)[1]
    return build_model(config, schema).eval(), schema


# An export takes seconds: the shapes that leave inputs of the graph out in different ways.
EXPORTED = ("everything", "no user side", "no embeddings", "user embeddings only")


def variants(shapes: tuple[str, ...] = tuple(SHAPES)) -> list[Any]:
    """Every model on every shape; where its YAML has the option, also with attention over the history."""
    found = []
    for path in MODELS:
        for shape in shapes:
            found.append(pytest.param(path, shape, {}, id=f"{path.stem}-{shape}"))
            if "attention" in OmegaConf.load(path) and {"history", "item"} <= set(SHAPES[shape][0]):
                attended = {"attention": {"history": "item"}}
                found.append(pytest.param(path, shape, attended, id=f"{path.stem}-{shape}-attention"))
    return found


def random_inputs(schema: FeatureSchema, users: int, candidates: int, seed: int) -> ModelInputs:
    """Every user has a candidate where there are enough; sequences are padded with zeros, and some are empty."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first = torch.arange(min(users, candidates))
    rest = torch.randint(users, (candidates - len(first),), generator=generator)
    rows = {"user": users, "item": candidates}
    sequences, lengths = {}, {}
    for slot in schema.sequences:
        length = torch.randint(slot.max_length + 1, (rows[slot.rows],), generator=generator)
        inside = torch.arange(slot.max_length) < length.unsqueeze(1)
        sequences[slot.name] = normal(rows[slot.rows], slot.max_length, slot.dim) * inside.unsqueeze(-1)
        lengths[slot.name] = length
    return ModelInputs(
        user_pooled=normal(users, sum(slot.dim for slot in schema.user_pooled)),
        item_pooled=normal(candidates, sum(slot.dim for slot in schema.item_pooled)),
        user_dense=normal(users, len(schema.user_dense)),
        item_dense=normal(candidates, len(schema.item_dense)),
        user_index=torch.cat([first, rest]).sort().values,
        sequences=sequences,
        lengths=lengths,
    )


def rows_of(inputs: ModelInputs, schema: FeatureSchema, users: Tensor, items: Tensor, index: Tensor) -> ModelInputs:
    """The named rows of each side, with another user_index."""
    rows = {slot.name: users if slot.rows == "user" else items for slot in schema.sequences}
    return ModelInputs(
        user_pooled=inputs.user_pooled[users],
        item_pooled=inputs.item_pooled[items],
        user_dense=inputs.user_dense[users],
        item_dense=inputs.item_dense[items],
        user_index=index,
        sequences={name: values[rows[name]] for name, values in inputs.sequences.items()},
        lengths={name: values[rows[name]] for name, values in inputs.lengths.items()},
    )


def logits_of(model: RankModel, inputs: ModelInputs) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(inputs)


def test_there_are_models() -> None:
    assert {path.stem for path in MODELS} >= {"dnn", "mmoe"}


@pytest.mark.parametrize(("path", "shape", "overrides"), variants())
class TestEveryModel:
    def test_gives_a_finite_logit_per_task_and_candidate(self, path: Path, shape: str, overrides: dict) -> None:
        model, schema = build(path, shape, **overrides)
        logits = logits_of(model, random_inputs(schema, 2, 9, seed=1))
        assert tuple(logits) == SHAPES[shape][1]
        for values in logits.values():
            assert values.shape == (9,)
            assert values.dtype == torch.float32
            assert torch.isfinite(values).all()
            assert values.max() - values.min() > 1e-3  # an untrained model, too, tells rows apart

    def test_scores_a_candidate_alone_as_in_a_batch(self, path: Path, shape: str, overrides: dict) -> None:
        """No row sees another, and each has its own user: in any order, repeated, with users left out."""
        model, schema = build(path, shape, **overrides)
        inputs = random_inputs(schema, 4, 23, seed=2)
        together = logits_of(model, inputs)
        alone: dict[str, list[float]] = {task: [] for task in together}
        for candidate, user in enumerate(inputs.user_index):
            single = rows_of(inputs, schema, user.view(1), torch.tensor([candidate]), torch.tensor([0]))
            for task, value in logits_of(model, single).items():
                alone[task].append(float(value))
        for task, values in together.items():
            np.testing.assert_allclose(values, alone[task], atol=1e-5, rtol=0)
        order = torch.from_numpy(np.random.default_rng(2).permutation(23))
        shuffled = rows_of(inputs, schema, torch.arange(4), order, inputs.user_index[order])
        a_user_each = rows_of(inputs, schema, inputs.user_index, torch.arange(23), torch.arange(23))
        for task, values in together.items():
            np.testing.assert_allclose(logits_of(model, shuffled)[task], values[order], atol=1e-5, rtol=0)
            np.testing.assert_allclose(logits_of(model, a_user_each)[task], values, atol=1e-5, rtol=0)

    def test_every_parameter_and_every_input_matters(self, path: Path, shape: str, overrides: dict) -> None:
        model, schema = build(path, shape, **overrides)
        inputs = random_inputs(schema, 16, 64, seed=3)
        floats = {name: getattr(inputs, name).requires_grad_() for name in ("user_pooled", "item_pooled")}
        floats |= {name: getattr(inputs, name).requires_grad_() for name in ("user_dense", "item_dense")}
        floats |= {name: values.requires_grad_() for name, values in inputs.sequences.items()}
        # A weight of its own per logit: a sum over all is blind to what only shifts them, as a softmax does.
        generator = torch.Generator().manual_seed(3)
        logits = model.train()(inputs)
        sum((torch.randn(64, generator=generator) * values).sum() for values in logits.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-7, f"{name} never changes the logits"
        for name, tensor in floats.items():
            if tensor.numel():
                assert tensor.grad is not None, name
                columns = tensor.grad.abs().flatten(0, -2).amax(dim=0)
                assert (columns > 0).all(), f"columns of {name} that no logit depends on: {columns == 0}"

    def test_takes_empty_sequences(self, path: Path, shape: str, overrides: dict) -> None:
        model, schema = build(path, shape, **overrides)
        inputs = random_inputs(schema, 3, 8, seed=4)
        empty = dataclasses.replace(
            inputs,
            sequences={name: torch.zeros_like(values) for name, values in inputs.sequences.items()},
            lengths={name: torch.zeros_like(values) for name, values in inputs.lengths.items()},
        )
        for task, values in logits_of(model, empty).items():
            assert torch.isfinite(values).all()
            if schema.sequences:  # and a sequence that is not empty changes something
                assert not torch.equal(values, logits_of(model, inputs)[task])

    def test_starts_from_the_seed_alone(self, path: Path, shape: str, overrides: dict) -> None:
        first, _ = build(path, shape, **overrides)
        torch.manual_seed(999)
        second, _ = build(path, shape, **overrides)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "emulated": 2e-3, "int8": 1e-2}


@pytest.mark.parametrize(("path", "shape", "overrides"), variants(EXPORTED))
class TestEveryGraph:
    def test_says_what_torch_says(self, path: Path, shape: str, overrides: dict) -> None:
        """Behind all passes, in fp32, fp16 (as a CPU runs it, and with every half rounded) and int8; U 1 … 8,
        N 1 … 5000."""
        model, schema = build(path, shape, **overrides)
        graph, reports = optimize(dense_graph(model, schema))
        assert [(report.name, report.left_out) for report in reports if report.left_out] == []
        graphs = {
            "fp32": graph,
            "fp16": to_fp16(graph),
            "emulated": to_fp16(graph, emulated=True),
            "int8": to_int8(graph, matrix_layers(graph)),  # also those that are too small to gain
        }
        for each in graphs.values():
            _check_names(each, schema)
        sessions = {name: in_memory(each) for name, each in graphs.items()}
        taken = {node.name for node in sessions["fp32"].get_inputs()}
        assert taken <= graph_inputs(schema).keys()
        for seed, (users, candidates) in enumerate([(1, 1), (1, 5000), (8, 5000), (8, 8), (5, 700), (2, 17), (3, 1)]):
            inputs = random_inputs(schema, users, candidates, seed)
            expected = {task: torch.sigmoid(values) for task, values in logits_of(model, inputs).items()}
            feed = {name: value.numpy() for name, value in named(inputs, schema).items() if name in taken}
            for name, session in sessions.items():
                scores = session.run(list(schema.tasks), feed)
                for task, found in zip(schema.tasks, scores, strict=True):
                    assert found.dtype == np.float32
                    np.testing.assert_allclose(
                        found, expected[task], atol=TOLERANCE[name], rtol=0, err_msg=f"{name} {task}"
                    )


def named(inputs: ModelInputs, schema: FeatureSchema) -> dict[str, Tensor]:
    """Every part by the name that the graph knows it by."""
    parts = {name: getattr(inputs, name) for name in ("user_pooled", "item_pooled", "user_dense", "item_dense")}
    parts |= {"user_index": inputs.user_index, **inputs.sequences}
    return parts | {f"{name}.length": length for name, length in inputs.lengths.items()}


def _check_names(model: onnx.ModelProto, schema: FeatureSchema) -> None:
    """Nodes have names of their own, inputs and outputs are those of the design, floats at the border are fp32."""
    graph = model.graph
    onnx.checker.check_model(model, full_check=True)
    names = [node.name for node in graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert [node.name for node in graph.output] == list(schema.tasks)
    for node in (*graph.input, *graph.output):
        integral = node.name == "user_index" or node.name.endswith(".length")
        kind = onnx.TensorProto.INT64 if integral else onnx.TensorProto.FLOAT
        assert node.type.tensor_type.elem_type == kind, node.name
        assert node.type.tensor_type.shape.dim[0].dim_param in ("U", "N"), node.name
