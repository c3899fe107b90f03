"""What the exporter cannot express is told with the operation and the module it came from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from export.graph import dense_graph
from tests.models.test_model_contract import MODELS, build
from torchrank.features.schema import FeatureSchema
from torchrank.models import RankModel
from torchrank.training.quiet import quiet_libraries


class Bessel(nn.Module):
    """ONNX has no such function."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Branching(nn.Module):
    """Which operations there are depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x + 1


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("weights of day 8")


def with_layer(layer: nn.Module) -> tuple[RankModel, FeatureSchema]:
    path = next(path for path in MODELS if path.stem == "dnn")
    model, schema = build(path, "no sequences")
    model.bottom.layers.append(layer)
    return model, schema


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Bessel(), r"op prims\.bessel_j0\.default in module 'bottom\.layers\.\d' \(Bessel\)$"),
        (Branching(), r"Could not guard on data-dependent expression .* in module 'bottom\.layers\.\d' \(Branching\)$"),
        (Failing(), r"'weights of day 8' in module 'bottom\.layers\.\d' \(Failing\)$"),
    ],
)
def test_op_and_module_are_named(layer: nn.Module, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    quiet_libraries()
    model, schema = with_layer(layer)
    with pytest.raises(ValueError, match=f"^DNN cannot be exported to ONNX: {message}"):
        dense_graph(model, schema)
    captured = capfd.readouterr()
    assert captured.err + captured.out == ""  # the exporter's own pages of text are not the user's to read
