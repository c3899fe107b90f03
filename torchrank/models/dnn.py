"""Shared bottom with one tower per task (Caruana, Multitask Learning, 1997); with one task, a plain DNN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from torchrank.features.schema import FeatureSchema
from torchrank.models.base import RankModel
from torchrank.nn import MLP, FeatureInput, Tower
from torchrank.nn.inputs import ModelInputs


class DNN(RankModel):
    """logit_k = w_k · tower_k(bottom(x)) + b_k, x the concatenated features of a candidate, [N, width]."""

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        hidden: Sequence[int] = (256, 128),
        tower: Sequence[int] = (64,),
        dropout: float = 0.0,
        attention: Mapping[str, str] | None = None,
        attention_hidden: Sequence[int] = (32,),
    ) -> None:
        super().__init__()
        self.input = FeatureInput(schema, attention=attention, attention_hidden=attention_hidden)
        self.bottom = MLP(self.input.out_dim, hidden, dropout=dropout)
        towers = {task: Tower(self.bottom.out_dim, tower, dropout=dropout) for task in schema.tasks}
        self.towers = nn.ModuleDict(towers)

    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        shared = self.bottom(self.input(inputs))
        return {task: tower(shared) for task, tower in self.towers.items()}
