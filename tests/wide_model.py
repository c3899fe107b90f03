"""A model that asks for two embeddings of a feature: `wide` of dim 1 beside `deep` (Cheng et al., 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrank.features.schema import EmbeddingGroup, FeatureSchema
from torchrank.models import DNN, ModelInputs


class WideAndDeep(DNN):
    """logit_k = DNN_k(x) + Σ wide embeddings of the candidate and its user."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__(schema, hidden=(8,), tower=(4,))
        self.wide_user, self.wide_item = (
            [slot.start for slot in slots if slot.group == "wide"] for slots in (schema.user_pooled, schema.item_pooled)
        )

    @classmethod
    def embedding_groups(cls) -> dict[str, EmbeddingGroup]:
        return {"deep": EmbeddingGroup(), "wide": EmbeddingGroup(("user_id", "item_id", "tags"), dim=1)}

    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        user = inputs.user_pooled[:, self.wide_user].sum(dim=1)
        wide = inputs.item_pooled[:, self.wide_item].sum(dim=1) + torch.index_select(user, 0, inputs.user_index)
        return {task: logits + wide for task, logits in super().forward(inputs).items()}
