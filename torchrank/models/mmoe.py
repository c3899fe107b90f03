"""Multi-gate Mixture-of-Experts (Ma et al., KDD'18, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torchrank.features.schema import FeatureSchema
from torchrank.models.base import RankModel
from torchrank.nn import MLP, FeatureInput, Tower
from torchrank.nn.inputs import ModelInputs


class MMoE(RankModel):
    """Every task mixes the same experts by a gate of its own.

        g_k     = softmax(W_k x)                       gate of task k          [N, E]
        f_k     = Σ_e g_k,e · expert_e(x)              mixture                 [N, D]
        logit_k = w_k · tower_k(f_k) + b_k                                     [N]

    x is the concatenated features of a candidate, [N, width]; N candidates, E experts, D the experts' last width.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        experts: int = 8,
        expert_hidden: Sequence[int] = (128, 64),
        tower: Sequence[int] = (32,),
        dropout: float = 0.0,
        attention: Mapping[str, str] | None = None,
        attention_hidden: Sequence[int] = (32,),
    ) -> None:
        super().__init__()
        self.input = FeatureInput(schema, attention=attention, attention_hidden=attention_hidden)
        width = self.input.out_dim
        self.experts = nn.ModuleList(MLP(width, expert_hidden, dropout=dropout) for _ in range(experts))
        self.gates = nn.ModuleDict({task: nn.Linear(width, experts, bias=False) for task in schema.tasks})
        towers = {task: Tower(expert_hidden[-1], tower, dropout=dropout) for task in schema.tasks}
        self.towers = nn.ModuleDict(towers)

    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        x = self.input(inputs)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # [N, E, D]
        logits = {}
        for task, tower in self.towers.items():
            gate = torch.softmax(self.gates[task](x), dim=-1)  # [N, E]
            mixture = torch.matmul(gate.unsqueeze(1), experts).squeeze(1)  # [N, D]
            logits[task] = tower(mixture)
        return logits
