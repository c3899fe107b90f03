"""Ranking models of the shapes that scripts/bench/export.py measures, written as a user of torchrank would write them.

MMoE is the repository's own. DIN, DeepFM and DCNv2 stand here with the papers they follow; none of them knows of the
graph passes. U requests, N candidates, F fields, D dim, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.graph import DenseGraph, graph_inputs
from torchrank.features.schema import EmbeddingGroup, FeatureSchema, build_schema
from torchrank.features.spec import FeatureSpec, load_feature_spec
from torchrank.models import MMoE, ModelInputs, RankModel
from torchrank.nn import MLP, FeatureInput, TargetAttention, Tower

HISTORY = 50  # behaviours
_EMBEDDING_SCALE = 0.1  # deviation of random embeddings: keeps a factorisation machine's logits where sigmoid is steep

Built = tuple[RankModel, FeatureSchema]


class DIN(RankModel):
    """Deep Interest Network (Zhou et al., KDD'18): the history, summed by its relevance for the candidate.

        v     = Σ_t a(q, k_t) k_t             TargetAttention; a softmax over t, or the paper's plain sum
        logit = w · MLP([user, item, v]) + b

    k_t: the user's sequence `history` [U, T, D]; q: the candidate's pooled feature `item` [N, D].
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        hidden: Sequence[int] = (200, 80),
        attention_hidden: Sequence[int] = (80, 40),
        normalize: bool = True,
    ) -> None:
        super().__init__()
        (history,) = schema.sequences
        query = next(slot for slot in schema.item_pooled if slot.feature == "item")
        self.query = (query.start, query.start + query.dim)
        self.history = history.name
        self.attention = TargetAttention(history.dim, attention_hidden, normalize=normalize)
        width = sum(slot.dim for slot in (*schema.user_pooled, *schema.item_pooled)) + history.dim
        self.towers = nn.ModuleDict({task: Tower(width, hidden) for task in schema.tasks})

    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        keys = inputs.sequences[self.history].index_select(0, inputs.user_index)  # [N, T, D]
        length = inputs.lengths[self.history].index_select(0, inputs.user_index)
        interest = self.attention(inputs.item_pooled[:, slice(*self.query)], keys, length)
        user = inputs.user_pooled.index_select(0, inputs.user_index)
        x = torch.cat([user, inputs.item_pooled, interest], dim=1)
        return {task: tower(x) for task, tower in self.towers.items()}


class DeepFM(RankModel):
    """A factorisation machine beside an MLP, over the same embeddings (Guo et al., IJCAI'17).

        first  = Σ_f w_f                                             w_f: field f in the group `wide`, of dim 1
        second = Σ_{f<g} <v_f, v_g> = ½ Σ_d [(Σ_f v_f)² - Σ_f v_f²]_d      v_f: field f in the group `deep`
        logit  = first + second + w · MLP([v_1 … v_F]) + b

    All fields are embeddings of one dim; a number is a field by its buckets.
    """

    def __init__(self, schema: FeatureSchema, *, hidden: Sequence[int] = (400, 400, 400)) -> None:
        super().__init__()
        dims = {slot.dim for slot in (*schema.user_pooled, *schema.item_pooled) if slot.group == "deep"}
        dense = (*schema.user_dense, *schema.item_dense)
        if dense or len(dims) != 1:
            raise ValueError(
                f"DeepFM: found dims {sorted(dims)} and dense features {', '.join(dense) or 'none'}; "
                "accepted: fields of one dim, numbers as op bucketize"
            )
        self.dim = dims.pop()
        self.wide = FeatureInput(schema, group="wide")
        self.fields = FeatureInput(schema)
        self.towers = nn.ModuleDict({task: Tower(self.fields.out_dim, hidden) for task in schema.tasks})

    @classmethod
    def embedding_groups(cls) -> dict[str, EmbeddingGroup]:
        return {"deep": EmbeddingGroup(), "wide": EmbeddingGroup(dim=1)}

    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        x = self.fields(inputs)
        v = x.unflatten(1, (-1, self.dim))  # [N, F, D]
        second = 0.5 * (v.sum(dim=1).square() - v.square().sum(dim=1)).sum(dim=1)
        shared = self.wide(inputs).sum(dim=1) + second
        return {task: shared + tower(x) for task, tower in self.towers.items()}


class CrossNet(nn.Module):
    """x_{l+1} = x_0 ∘ (W_l x_l + b_l) + x_l, W_l of full rank (DCN V2, equation 1). [N, width] to [N, width]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


class DCNv2(RankModel):
    """Cross layers beside an MLP, in parallel (Wang et al., DCN V2, WWW'21, section 3).

    logit = w · [cross(x), MLP(x)] + b, x the concatenated features of a candidate, [N, width].
    """

    def __init__(
        self, schema: FeatureSchema, *, cross_layers: int = 4, hidden: Sequence[int] = (400, 400, 400)
    ) -> None:
        super().__init__()
        self.input = FeatureInput(schema)
        self.cross = CrossNet(self.input.out_dim, cross_layers)
        self.deep = MLP(self.input.out_dim, hidden)
        width = self.input.out_dim + self.deep.out_dim
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in schema.tasks})

    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        x = self.input(inputs)
        both = torch.cat([self.cross(x), self.deep(x)], dim=1)
        return {task: head(both).squeeze(-1) for task, head in self.heads.items()}


def _mmoe(shrink: int) -> Built:
    """Input 512, of which 317 (62 %) are the user's; 8 experts [512, 256], two tasks."""
    spec = _spec(user=(19, 13), item=(12, 3), dim=16, shrink=shrink)
    schema = build_schema(spec, ("click", "finish"), MMoE.embedding_groups())
    hidden, tower = _widths((512, 256), shrink), _widths((64,), shrink)
    return MMoE(schema, experts=8, expert_hidden=hidden, tower=tower), schema


def _din(shrink: int, *, dim: int = 64, normalize: bool = True) -> Built:
    """Three user and three item fields beside the history; dim 64 is that of an id in the paper's code."""
    spec = _spec(user=(3, 0), item=(2, 0), dim=dim, shrink=1, history=True)
    schema = build_schema(spec, ("click",), DIN.embedding_groups())
    hidden, attention = _widths((200, 80), shrink), _widths((80, 40), shrink)
    return DIN(schema, hidden=hidden, attention_hidden=attention, normalize=normalize), schema


def _deepfm(shrink: int) -> Built:
    """50 fields of dim 16, of which 31 (62 %) are the user's; input 800."""
    schema = build_schema(_fields(shrink), ("click",), DeepFM.embedding_groups())
    return DeepFM(schema, hidden=_widths((400, 400, 400), shrink)), schema


def _dcnv2(shrink: int) -> Built:
    schema = build_schema(_fields(shrink), ("click",), DCNv2.embedding_groups())
    return DCNv2(schema, hidden=_widths((400, 400, 400), shrink)), schema


def _fields(shrink: int) -> FeatureSpec:
    return _spec(user=(31, 0), item=(19, 0), dim=16, shrink=shrink)


def _spec(*, user: tuple[int, int], item: tuple[int, int], dim: int, shrink: int, history: bool = False) -> FeatureSpec:
    """So many embedded fields and numbers of each side; with a history, also the `item` that it is compared with."""
    columns: dict[str, Any] = {}
    features: list[dict[str, Any]] = []
    for side, (fields, numbers) in (("user", user), ("item", item)):
        for number in range(max(1, fields // shrink)):
            columns[f"{side}_{number}"] = {"side": side, "type": "string"}
            features.append({"op": "id", "buckets": 1000, "dim": dim})
        for number in range(-(-numbers // shrink)):
            columns[f"{side}_number_{number}"] = {"side": side, "type": "float32"}
            features.append({"op": "raw"})
    if history:
        columns |= {"item": {"side": "item", "type": "string"}, "history": {"side": "user", "type": "list<string>"}}
        shared = {"buckets": 1000, "dim": dim, "table": "item"}
        features += [{"op": "id", **shared}, {"op": "last_k", "max_length": HISTORY, **shared}]
    named = [{"name": name, "inputs": [name], **feature} for name, feature in zip(columns, features, strict=True)]
    return load_feature_spec({"columns": columns, "features": named})


def _widths(widths: Sequence[int], shrink: int) -> list[int]:
    return [max(4, width // shrink) for width in widths]


BENCH_MODELS: dict[str, Callable[[int], Built]] = {
    "mmoe": _mmoe,
    "din": _din,
    "din_32": lambda shrink: _din(shrink, dim=32),
    "din_sum": lambda shrink: _din(shrink, normalize=False),
    "deepfm": _deepfm,
    "dcnv2": _dcnv2,
}


def build(name: str, shrink: int = 1) -> Built:
    """The model of BENCH_MODELS, untrained. shrink: divides widths of layers and numbers of fields, for tests."""
    torch.manual_seed(0)
    model, schema = BENCH_MODELS[name](shrink)
    return model.eval(), schema


def random_request(
    schema: FeatureSchema, *, users: int, candidates: int, seed: int, full: bool = True
) -> dict[str, NDArray[np.generic]]:
    """The graph's inputs; candidates of a user are neighbours. Histories are full, or of any length from 0 on."""
    rng = np.random.default_rng(seed)
    rows = {"user": users, "item": candidates}
    feed: dict[str, NDArray[np.generic]] = {}
    for name, (side, rest) in graph_inputs(schema).items():
        if not name.endswith(".length"):
            feed[name] = _EMBEDDING_SCALE * rng.standard_normal((rows[side], *rest), np.float32)
    for slot in schema.sequences:
        shortest = slot.max_length if full else 0
        length = rng.integers(shortest, slot.max_length, rows[slot.rows], endpoint=True)
        feed[slot.name][np.arange(slot.max_length) >= length[:, np.newaxis]] = 0
        feed[f"{slot.name}.length"] = length
    return feed | {"user_index": np.sort(rng.integers(0, users, candidates))}


def as_tensors(feed: Mapping[str, NDArray[np.generic]], schema: FeatureSchema) -> tuple[Tensor, ...]:
    """The arguments of a DenseGraph, in its order."""
    return tuple(torch.from_numpy(feed[name]) for name in graph_inputs(schema))


def torch_scores(
    model: RankModel, schema: FeatureSchema, feed: Mapping[str, NDArray[np.generic]]
) -> list[NDArray[np.float32]]:
    """Per task [N]: what every graph has to say."""
    with torch.inference_mode():
        return [scores.numpy() for scores in DenseGraph(model, schema).eval()(*as_tensors(feed, schema))]
