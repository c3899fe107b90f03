"""The head of one task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchrank.nn.mlp import MLP


class Tower(nn.Sequential):
    """logit = w · MLP(x) + b. in: float [N, in_dim]; out: float [N]."""

    def __init__(self, in_dim: int, hidden: Sequence[int], *, dropout: float = 0.0) -> None:
        mlp = MLP(in_dim, hidden, dropout=dropout)
        super().__init__(mlp, nn.Linear(mlp.out_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)
