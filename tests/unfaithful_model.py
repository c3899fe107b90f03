"""A model that ONNX Runtime cannot score as torch does: what the parity gate is for."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrank.features.schema import FeatureSchema
from torchrank.models import DNN, ModelInputs


class Unfaithful(DNN):
    """Its graph adds 0.1 to every logit."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__(schema, hidden=(8,), tower=())

    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        offset = 0.1 if torch.compiler.is_exporting() else 0.0
        return {task: logits + offset for task, logits in super().forward(inputs).items()}
