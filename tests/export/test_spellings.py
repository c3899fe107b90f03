"""What the passes make of models as people write them: user rows taken in several ways, attention in several spellings.

Each goes through the exporter and all passes, scores what torch scores, and does the user's work once. N candidates.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.example_inputs import in_memory
from export.graph import DenseGraph, dense_graph
from export.optimize import optimize
from torchrank.features.schema import FeatureSchema, build_schema
from torchrank.features.spec import load_feature_spec
from torchrank.models import ModelInputs, RankModel

FIELDS, DIM, KEYS = {"user": 10, "item": 6}, 8, 12
WIDTH, USER, ITEM = 16 * DIM, 10 * DIM, 6 * DIM


def schema() -> FeatureSchema:
    columns, features = {}, []
    for side, fields in FIELDS.items():
        for number in range(fields):
            columns[f"{side}_{number}"] = {"side": side, "type": "string"}
            features.append({"name": f"{side}_{number}", "inputs": [f"{side}_{number}"], "op": "id", "buckets": 50})
    columns["history"] = {"side": "user", "type": "list<string>"}
    features.append({"name": "history", "inputs": ["history"], "op": "last_k", "max_length": KEYS, "buckets": 50})
    return build_schema(load_feature_spec({"embedding_dim": DIM, "columns": columns, "features": features}), ("click",))


class Written(RankModel):
    """A model of one task out of a function of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 64), nn.Linear(64, 1)
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.pairs, self.weigh = nn.Linear(4 * DIM, 20), nn.Linear(20, 1)
        self.fields = nn.Linear(DIM, 32)

    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        return {"click": self.logit(inputs)}

    def logit(self, inputs: ModelInputs) -> Tensor:
        raise NotImplementedError

    def mlp(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))).squeeze(-1)


class IndexSelect(Written):
    def logit(self, inputs: ModelInputs) -> Tensor:
        return self.mlp(torch.cat([inputs.user_pooled.index_select(0, inputs.user_index), inputs.item_pooled], 1))


class Brackets(Written):
    def logit(self, inputs: ModelInputs) -> Tensor:
        return self.mlp(torch.cat([inputs.user_pooled[inputs.user_index], inputs.item_pooled], -1))


class ColumnsTakenOut(Written):
    """A slice of the concatenated features that is the user's alone."""

    def logit(self, inputs: ModelInputs) -> Tensor:
        x = torch.cat([inputs.user_pooled[inputs.user_index], inputs.item_pooled], 1)
        user, item = x.split([USER, ITEM], dim=1)
        return self.mlp(x) + (torch.tanh(user) * 0.1).sum(1) + x[:, USER:].mean(1) + item.amax(1)


class FieldsApart(Written):
    """A layer per field, over the features as [N, fields, dim], and a factorisation machine."""

    def logit(self, inputs: ModelInputs) -> Tensor:
        x = torch.cat([inputs.user_pooled[inputs.user_index], inputs.item_pooled], 1)
        v = x.view(-1, 16, DIM)
        return self.mlp(x) + 0.1 * (v.sum(1).square() - v.square().sum(1)).sum(1)


class AttentionByHand(Written):
    """Two heads of self-attention over the user's history, written for candidates' rows."""

    def logit(self, inputs: ModelInputs) -> Tensor:
        keys = inputs.sequences["history"][inputs.user_index]
        q, k, v = (self.heads(layer(keys)) for layer in (self.query, self.key, self.value))
        seen = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(DIM / 2), -1) @ v
        pooled = seen.transpose(1, 2).reshape(-1, KEYS, DIM).mean(1)
        x = torch.cat([inputs.user_pooled[inputs.user_index], inputs.item_pooled], 1)
        return self.mlp(x) + pooled.sum(1)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(-1, KEYS, 2, DIM // 2).transpose(1, 2)


class AttentionOfTorch(AttentionByHand):
    def logit(self, inputs: ModelInputs) -> Tensor:
        keys = inputs.sequences["history"][inputs.user_index]
        q, k, v = (self.heads(layer(keys)) for layer in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, KEYS, DIM)
        x = torch.cat([inputs.user_pooled[inputs.user_index], inputs.item_pooled], 1)
        return self.mlp(x) + seen.mean(1).sum(1)


class TargetAttention(Written):
    """Over [q, k, q - k, q ∘ k], the query repeated for every key."""

    def logit(self, inputs: ModelInputs) -> Tensor:
        keys = inputs.sequences["history"][inputs.user_index]
        q = self.repeated(inputs.item_pooled[:, :DIM].unsqueeze(1))
        weights = self.weigh(torch.relu(self.pairs(torch.cat([q, keys, q - keys, q * keys], -1))))
        x = torch.cat([inputs.user_pooled[inputs.user_index], inputs.item_pooled], 1)
        return self.mlp(x) + (weights * keys).sum((1, 2))

    def repeated(self, q: Tensor) -> Tensor:
        return q.repeat(1, KEYS, 1)


class TargetAttentionExpanded(TargetAttention):
    def repeated(self, q: Tensor) -> Tensor:
        return q.expand(-1, KEYS, -1)


# model: the most that may be left of the exporter's FLOPs for one user with 500 candidates
MODELS: dict[type[Written], float] = {
    IndexSelect: 0.42,
    Brackets: 0.42,
    ColumnsTakenOut: 0.42,
    FieldsApart: 0.42,
    AttentionByHand: 0.25,
    AttentionOfTorch: 0.25,
    TargetAttention: 0.5,
    TargetAttentionExpanded: 0.5,
}


@pytest.mark.parametrize("written", MODELS)
def test_the_users_work_is_done_once_however_it_is_written(written: type[Written]) -> None:
    torch.manual_seed(7)
    model = written().eval()
    graph, reports = optimize(dense_graph(model, schema()))
    assert [report.left_out for report in reports] == [None] * len(reports)
    assert reports[-1].flops[1] < MODELS[written] * reports[0].flops[0]
    session, module = in_memory(graph), DenseGraph(model, schema()).eval()
    for seed, (users, candidates) in enumerate([(1, 1), (1, 30), (5, 17), (8, 8)]):
        feed = random_request(users, candidates, seed)
        tensors = (torch.from_numpy(feed[name]) for name in module.names)
        with torch.no_grad():
            (expected,) = module(*tensors)
        (found,) = session.run(["click"], {node.name: feed[node.name] for node in session.get_inputs()})
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def random_request(users: int, candidates: int, seed: int) -> dict[str, np.ndarray]:
    """Users' candidates in any order."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return {
        "user_pooled": rng.standard_normal((users, USER), np.float32),
        "item_pooled": rng.standard_normal((candidates, ITEM), np.float32),
        "history": rng.standard_normal((users, KEYS, DIM), np.float32),
        "history.length": np.full(users, KEYS),
        "user_index": rng.integers(0, users, candidates),
    }


class OneLogitForTwoTasks(Written):
    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        logit = self.mlp(torch.cat([inputs.user_pooled[inputs.user_index], inputs.item_pooled], 1))
        return {"click": logit, "finish": logit}


def test_two_tasks_of_one_logit_keep_their_names() -> None:
    features = schema()
    two = msgspec.structs.replace(features, tasks=("click", "finish"))
    graph, reports = optimize(dense_graph(OneLogitForTwoTasks().eval(), two))
    assert [report.left_out for report in reports] == [None] * len(reports)
    assert [output.name for output in graph.graph.output] == ["click", "finish"]
    session = in_memory(graph)
    feed = random_request(2, 9, seed=1)
    click, finish = session.run(["click", "finish"], {node.name: feed[node.name] for node in session.get_inputs()})
    np.testing.assert_array_equal(click, finish)
