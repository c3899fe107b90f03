"""Models and layers against their formulas, written out in float64 as loops over candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from torchrank.features.schema import FeatureSchema, SequenceSlot, Slot, TableSpec
from torchrank.models import DNN, MMoE, ModelInputs
from torchrank.nn import MLP, TargetAttention

Vector = NDArray[np.float64]

# [user 0:8] [wide 8:9] [hour 9:13] and [item 0:8] [wide 8:9]: the wide group is not the deep models' business
SCHEMA = FeatureSchema(
    user_pooled=(
        Slot("deep", "user", "user", 8, 0, "sum"),
        Slot("wide", "user", "wide.user", 1, 8, "sum"),
        Slot("deep", "hour", "hour", 4, 9, "sum"),
    ),
    item_pooled=(Slot("wide", "item", "wide.item", 1, 0, "sum"), Slot("deep", "item", "item", 8, 1, "sum")),
    user_dense=("age",),
    item_dense=("price", "length"),
    sequences=(
        SequenceSlot("history", "deep", "history", "item", 8, 5, "user"),
        SequenceSlot("similar", "deep", "similar", "item", 8, 3, "item"),
        SequenceSlot("topics", "deep", "topics", "topic", 4, 6, "user"),
    ),
    tables=(TableSpec("user", 9, 8, ("user",)),),  # models do not look at tables
    tasks=("click", "finish"),
)
U, N = 4, 13
WIDTH = 8 + 4 + 1 + 8 + 2 + 8 + 8 + 4


def random_inputs(seed: int) -> ModelInputs:
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    sequences, lengths = {}, {}
    for slot in SCHEMA.sequences:
        rows = U if slot.rows == "user" else N
        length = rng.integers(0, slot.max_length + 1, rows)
        length[0] = 0
        inside = np.arange(slot.max_length) < length[:, None]
        sequences[slot.name] = normal(rows, slot.max_length, slot.dim) * torch.from_numpy(inside).unsqueeze(-1)
        lengths[slot.name] = torch.from_numpy(length)
    user_index = np.sort(rng.integers(0, U, N))
    return ModelInputs(normal(U, 13), normal(N, 9), normal(U, 1), normal(N, 2), torch.from_numpy(user_index),
                       sequences, lengths)  # fmt: skip


def array(tensor: torch.Tensor) -> Vector:
    return tensor.detach().numpy().astype(np.float64)


def perceptron(layers: nn.Module, x: Vector) -> Vector:
    """relu(W x + b) per linear layer but a last one of width 1, which is plain."""
    for layer in [module for module in layers.modules() if isinstance(module, nn.Linear)]:
        x = array(layer.weight) @ x + (0 if layer.bias is None else array(layer.bias))
        if len(x) > 1:
            x = np.maximum(x, 0)
    return x


def softmax(x: Vector) -> Vector:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def attended(layer: TargetAttention, query: Vector, keys: Vector, length: int) -> Vector:
    """The docstring's formula over the positions below `length`."""
    scores = []
    for key in keys[:length]:
        hidden = perceptron(layer.mlp, np.concatenate([query, key, query - key, query * key]))
        bias = 0.0 if layer.score.bias is None else layer.score.bias.item()
        scores.append(float(array(layer.score.weight)[0] @ hidden) + bias)
    weights = softmax(np.array(scores)) if layer.normalize and scores else np.array(scores)
    return sum((weight * key for weight, key in zip(weights, keys, strict=False)), np.zeros(len(query)))


def mean(keys: Vector, length: int) -> Vector:
    return keys[:length].sum(axis=0) / max(length, 1)


def candidate_vector(inputs: ModelInputs, n: int, attention: TargetAttention | None) -> Vector:
    """x of candidate n: what FeatureInput says it is."""
    user = int(inputs.user_index[n])
    item = array(inputs.item_pooled[n, 1:9])
    parts = [array(inputs.user_pooled[user, :8]), array(inputs.user_pooled[user, 9:]), array(inputs.user_dense[user])]
    parts += [item, array(inputs.item_dense[n])]
    for slot in SCHEMA.sequences:
        row = user if slot.rows == "user" else n
        keys, length = array(inputs.sequences[slot.name][row]), int(inputs.lengths[slot.name][row])
        if slot.name == "history" and attention is not None:
            parts.append(attended(attention, item, keys, length))
        else:
            parts.append(mean(keys, length))
    return np.concatenate(parts)


@pytest.mark.parametrize("attention", [None, {"history": "item"}], ids=["mean", "attention"])
@pytest.mark.parametrize("seed", range(3))
def test_mmoe_is_the_papers_formula(seed: int, attention: dict[str, str] | None) -> None:
    """f_k(x) = Σ_e g_k(x)_e · f_e(x), g_k(x) = softmax(W_k x), y_k = h_k(f_k(x)): Ma et al., equations 5 to 8."""
    torch.manual_seed(seed)
    model = MMoE(SCHEMA, experts=3, expert_hidden=(10, 6), tower=(5,), attention=attention).eval()
    inputs = random_inputs(seed)
    with torch.no_grad():
        logits = model(inputs)
    layer = model.input.attention[0] if attention else None
    for n in range(N):
        x = candidate_vector(inputs, n, layer)
        assert len(x) == WIDTH
        outputs = [perceptron(expert, x) for expert in model.experts]
        for task in SCHEMA.tasks:
            gate = softmax(array(model.gates[task].weight) @ x)
            mixture = sum(g * output for g, output in zip(gate, outputs, strict=True))
            assert float(logits[task][n]) == pytest.approx(perceptron(model.towers[task], mixture).item(), abs=1e-5)


@pytest.mark.parametrize("attention", [None, {"history": "item"}], ids=["mean", "attention"])
@pytest.mark.parametrize("seed", range(3))
def test_dnn_is_towers_on_a_shared_bottom(seed: int, attention: dict[str, str] | None) -> None:
    torch.manual_seed(seed)
    model = DNN(SCHEMA, hidden=(12, 7), tower=(5, 3), attention=attention).eval()
    inputs = random_inputs(seed)
    with torch.no_grad():
        logits = model(inputs)
    layer = model.input.attention[0] if attention else None
    for n in range(N):
        shared = perceptron(model.bottom, candidate_vector(inputs, n, layer))
        for task in SCHEMA.tasks:
            assert float(logits[task][n]) == pytest.approx(perceptron(model.towers[task], shared).item(), abs=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_target_attention_sums_by_weight(seed: int, normalize: bool) -> None:
    print(f"seed {seed}")
    torch.manual_seed(seed)
    layer = TargetAttention(6, (9, 5), normalize=normalize)
    rng = np.random.default_rng(seed)
    length = rng.integers(0, 8, 40)
    length[:2] = 0, 7
    keys = rng.normal(size=(40, 7, 6)).astype(np.float32)  # not zero beyond the length: padding is masked
    query = rng.normal(size=(40, 6)).astype(np.float32)
    out = layer(*(torch.from_numpy(values) for values in (query, keys, length)))
    expected = [attended(layer, *row) for row in zip(query.astype(float), keys.astype(float), length, strict=True)]
    np.testing.assert_allclose(out.detach(), expected, atol=1e-5, rtol=0)
    assert (out[0] == 0).all()  # an empty sequence


def test_attention_weights_of_huge_scores_stay_finite_and_masked() -> None:
    """Scores far beyond fp16's range: still a softmax over the real positions alone."""
    layer = TargetAttention(2, ())
    with torch.no_grad():
        layer.score.weight.fill_(1000.0)
    keys = torch.tensor([[[3.0, 1.0], [1.0, 2.0], [900.0, 900.0]]])
    out = layer(torch.tensor([[1.0, 1.0]]), keys, torch.tensor([2]))
    np.testing.assert_allclose(out.detach(), [[3.0, 1.0]], atol=1e-6)


def test_mlp_with_batch_norm_and_dropout() -> None:
    """Evaluated: running mean and variance, no dropout."""
    torch.manual_seed(0)
    mlp = MLP(3, (4,), dropout=0.5, batch_norm=True)
    mlp(torch.randn(64, 3) * 5 + 2)
    mlp.eval()
    linear, norm = mlp.layers[0], mlp.layers[1]
    x = np.array([0.3, -2.0, 1.0])
    hidden = array(linear.weight) @ x + array(linear.bias)
    hidden = (hidden - array(norm.running_mean)) / np.sqrt(array(norm.running_var) + norm.eps)
    expected = np.maximum(hidden * array(norm.weight) + array(norm.bias), 0)
    np.testing.assert_allclose(mlp(torch.tensor(x[None], dtype=torch.float32)).detach()[0], expected, atol=1e-6)


def test_attention_that_does_not_fit_the_features_is_refused() -> None:
    for attention, message in {
        ("clicks", "item"): "attention over 'clicks': no such sequence; there are: history, similar, topics",
        ("history", "user"): "attention query 'user': no such item feature; there are: item",
        ("topics", "item"): r"attention over 'topics' \(dim 4\) with query 'item' \(dim 8\): the dims must be equal",
    }.items():
        with pytest.raises(ValueError, match=message):
            DNN(SCHEMA, attention=dict([attention]))
