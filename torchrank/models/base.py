"""RankModel: what every model of this package is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from torchrank.features.schema import EmbeddingGroup
from torchrank.nn.inputs import ModelInputs


class RankModel(nn.Module, ABC):
    """The dense part of a ranking model: embeddings and dense features in, one logit per task and candidate out.

    It never sees ids, tables, devices, optimizers or paths. A subclass takes `schema: FeatureSchema` and its own
    keyword arguments, which are the keys of its YAML under `conf/model/`.
    """

    @classmethod
    def embedding_groups(cls) -> dict[str, EmbeddingGroup]:
        """The embeddings this model asks for; a wide part, say, adds `"wide": EmbeddingGroup(dim=1)`."""
        return {"deep": EmbeddingGroup()}

    @abstractmethod
    def forward(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Logits float [N] per task."""
