"""Ranking models, one file each; `conf/model/` has a YAML for each. How to add one: README, "Add a model"."""

from torchrank.models.base import RankModel
from torchrank.models.dnn import DNN
from torchrank.models.mmoe import MMoE
from torchrank.nn.inputs import ModelInputs

__all__ = ["DNN", "MMoE", "ModelInputs", "RankModel"]
