"""A short training on made-up clicks: untrained, all scores are nearly the same, which hides a precision's errors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export.graph import DenseGraph, graph_inputs
from scripts.bench.export_models import as_tensors, random_request
from scripts.bench.export_sessions import Feed
from torchrank.features.schema import FeatureSchema
from torchrank.models import RankModel

_BIAS = -1.0  # about three clicks in ten


def train_briefly(model: RankModel, schema: FeatureSchema, *, steps: int, rows: int = 256) -> list[float]:
    """Adam on `rows` new candidates a step, the same clicks for every task; returns the losses. Ends in eval mode."""
    clicks = Clicks(schema)
    graph = DenseGraph(model, schema).train()
    optimizer = torch.optim.Adam(graph.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        request = random_request(schema, users=16, candidates=rows, seed=1_000_000 + step, full=False)
        tensors, labels = as_tensors(request, schema), clicks.draw(request)
        loss = torch.stack([F.binary_cross_entropy(scores, labels) for scores in graph(*tensors)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    graph.eval()
    return losses


class Clicks:
    """p = σ(Σ over inputs of t · x, with deviation 1 altogether, - 1); t random, a sequence by its mean."""

    def __init__(self, schema: FeatureSchema) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self._inputs = {name: side for name, (side, rest) in graph_inputs(schema).items() if rest}
        widths = {name: rest[-1] for name, (_, rest) in graph_inputs(schema).items() if rest}
        self._taste = {name: torch.randn(width, generator=self._generator) for name, width in widths.items()}

    def draw(self, request: Feed) -> Tensor:
        """0 or 1 per candidate, [N]."""
        inputs = {name: torch.from_numpy(request[name]) for name in (*self._inputs, "user_index")}
        logits = torch.full((len(inputs["user_index"]),), _BIAS)
        for name, side in self._inputs.items():
            liking = inputs[name] @ self._taste[name]
            liking = liking.mean(dim=1) if liking.dim() == 2 else liking
            if len(liking) > 1:
                liking = liking / (liking.std() * np.sqrt(len(self._inputs)))
            logits += liking.index_select(0, inputs["user_index"]) if side == "user" else liking
        return torch.bernoulli(torch.sigmoid(logits), generator=self._generator)
