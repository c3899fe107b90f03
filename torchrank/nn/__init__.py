"""Layers that several models use. A layer that one model alone uses lives in that model's file."""

from torchrank.nn.attention import TargetAttention
from torchrank.nn.feature_input import FeatureInput
from torchrank.nn.inputs import ModelInputs
from torchrank.nn.mlp import MLP
from torchrank.nn.tower import Tower

__all__ = ["MLP", "FeatureInput", "ModelInputs", "TargetAttention", "Tower"]
