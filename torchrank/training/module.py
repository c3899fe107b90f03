"""From a configuration to a trainable module: feature schema, embeddings, model, sharding, optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel

from torchrank.config_dir import config_dir
from torchrank.data.torch_batch import TorchBatch
from torchrank.features.schema import FeatureSchema, build_schema
from torchrank.features.spec import FeatureSpec, load_feature_spec
from torchrank.models.base import RankModel
from torchrank.training.config import Config
from torchrank.training.distributed import Ranks
from torchrank.training.embeddings import Embeddings
from torchrank.training.sharding import (
    TABLE_OPTIMIZERS,
    replicated_tables,
    shard,
    table_optimizer_arguments,
    table_parameters,
)
from torchrank.training.targets import build_target


class RankingModule(nn.Module):
    """Ids to logits: float [N, tasks], tasks in the schema's order."""

    def __init__(self, embeddings: Embeddings, model: RankModel) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.model = model
        self.tasks = embeddings.schema.tasks

    def forward(self, batch: TorchBatch) -> Tensor:
        logits = self.model(self.embeddings(batch))
        return torch.stack([logits[task] for task in self.tasks], dim=1)


@dataclass(frozen=True)
class Built:
    spec: FeatureSpec
    schema: FeatureSchema
    sharded: DistributedModelParallel
    optimizers: dict[str, torch.optim.Optimizer]  # those that are not fused into tables


def feature_schema(config: Config) -> tuple[FeatureSpec, FeatureSchema]:
    """What the configured model sees of the configured features."""
    spec = load_feature_spec(config.data.features)
    model = get_class(_model_config(config)["_target_"])
    if not issubclass(model, RankModel):
        raise ValueError(f"model._target_ is {model.__qualname__}, which is not a torchrank.models.RankModel")
    return spec, build_schema(spec, config.data.labels, model.embedding_groups())


def build_model(config: Config, schema: FeatureSchema) -> RankModel:
    """The dense part alone, on CPU, its start decided by `config.seed` and nothing else."""
    torch.manual_seed(config.seed)
    # The schema is an argument of the finished partial: inside its own configuration, Hydra would take it apart.
    try:
        model: RankModel = instantiate({**_model_config(config), "_partial_": True, "_convert_": "all"})(schema)
    except InstantiationException as error:
        raise ValueError(f"model: {error.__cause__ or error}") from error
    except TypeError as error:
        raise ValueError(f"model: {error}") from error
    return model


def build(config: Config, ranks: Ranks) -> Built:
    """Collective. The module sharded over the ranks, its tables filled and its optimizers ready."""
    spec, schema = feature_schema(config)
    replicated = replicated_tables(schema, config.sharding)
    module = RankingModule(Embeddings(schema, replicated), build_model(config, schema))
    sharded = shard(module, schema, config.sharding, config.optimizer.tables, ranks.device, config.seed)
    return Built(spec, schema, sharded, _optimizers(config, sharded))


def _optimizers(config: Config, sharded: DistributedModelParallel) -> dict[str, torch.optim.Optimizer]:
    fused = set(sharded.fused_optimizer.params)
    tables = set(table_parameters(sharded))
    named = {name: parameter for name, parameter in sharded.named_parameters() if name not in fused}
    dense = [parameter for name, parameter in named.items() if name not in tables]
    replicated = [parameter for name, parameter in named.items() if name in tables]
    make = build_target("optimizer.dense", config.optimizer.dense, partial=True)
    optimizers: dict[str, torch.optim.Optimizer] = {"dense_optimizer": make(dense)}
    if replicated:
        rule = config.optimizer.tables
        arguments: dict[str, Any] = table_optimizer_arguments(rule)
        optimizers["replicated_optimizer"] = TABLE_OPTIMIZERS[rule.name](replicated, **arguments)
    return optimizers


def _model_config(config: Config) -> dict[str, Any]:
    if not isinstance(config.model, dict) or "_target_" not in config.model:
        available = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))
        raise ValueError(f"no model is chosen: add +model=NAME; there are: {', '.join(available)}")
    return config.model
