"""Target attention over a behaviour sequence (Zhou et al., Deep Interest Network, KDD'18, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrank.nn.mlp import MLP


class TargetAttention(nn.Module):
    """How much each past behaviour matters for this candidate, and their sum by that weight.

        a_t = w · MLP([q, k_t, q - k_t, q ∘ k_t])            t < length
        out = Σ_t softmax(a)_t k_t                            (normalize=True)
        out = Σ_t (a_t + b) k_t                               (normalize=False, as in the paper)

    An empty sequence gives zeros. Shapes: query [N, D], keys [N, T, D], length int64 [N]; out [N, D].
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (32,), *, normalize: bool = True) -> None:
        super().__init__()
        self.mlp = MLP(4 * dim, hidden)
        self.score = nn.Linear(self.mlp.out_dim, 1, bias=not normalize)  # a softmax is blind to a bias
        self.normalize = normalize

    def forward(self, query: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        q = query.unsqueeze(1).expand_as(keys)
        pairs = torch.cat([q, keys, q - keys, q * keys], dim=-1)
        scores = self.score(self.mlp(pairs)).squeeze(-1)  # [N, T]
        inside = torch.arange(keys.shape[1], device=keys.device).unsqueeze(0) < length.unsqueeze(1)
        if self.normalize:
            # -1e4, not -inf: exact zeros after the softmax in fp32, finite in fp16, and no NaN for an empty row.
            scores = torch.softmax(scores.masked_fill(~inside, -1e4), dim=1)
        weights = scores * inside.to(scores.dtype)
        return torch.matmul(weights.unsqueeze(1), keys).squeeze(1)
