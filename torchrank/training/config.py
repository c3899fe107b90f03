"""The keys of a training configuration: closed sets are dataclasses, so that Hydra refuses a typo.

`model`, the data sources and the dense optimizer are open sets, built by `_target_`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class ShardingChoice(StrEnum):
    auto = "auto"
    data_parallel = "data_parallel"
    table_wise = "table_wise"
    row_wise = "row_wise"
    column_wise = "column_wise"


class TableRule(StrEnum):
    sgd = "sgd"
    adagrad = "adagrad"
    rowwise_adagrad = "rowwise_adagrad"


@dataclass
class ShardingConfig:
    default: ShardingChoice = ShardingChoice.auto
    tables: dict[str, ShardingChoice] = field(default_factory=dict)  # overrides by table


@dataclass
class TableOptimizerConfig:
    """Fused into the tables' backward pass. These are the rules whose kernels run on CPU and CUDA alike."""

    name: TableRule = TableRule.adagrad
    lr: float = 0.1
    eps: float = 1e-8


@dataclass
class OptimizerConfig:
    dense: dict[str, Any] = field(default_factory=lambda: {"_target_": "torch.optim.Adam", "lr": 2e-3})
    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)


@dataclass
class DataConfig:
    name: str = MISSING
    path: str = MISSING
    train: dict[str, Any] = MISSING  # sources, by _target_
    valid: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    labels: list[str] = MISSING  # label columns; their names are the tasks
    request_column: str | None = None  # rows with equal neighbouring values are one request; null: a request a row
    user_column: str | None = None  # groups of GAUC; null: no GAUC
    generate: dict[str, Any] | None = None  # called when `path` is missing; null: a missing path is an error
    features: dict[str, Any] = MISSING


@dataclass
class EarlyStoppingConfig:
    patience: int = 0  # validations without a better mean AUC before the run stops; 0: never
    min_delta: float = 0.0


@dataclass
class TrainingConfig:
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 2048  # rows of a step over all ranks; divisible by their number
    shuffle: bool = True
    validate_every: int | None = None  # steps; null: after each epoch
    validation_rows: int | None = None  # rows of one validation over all ranks; null: all
    checkpoint_every: int | None = None  # steps; null: with each validation
    keep_checkpoints: int = 2  # newest ones kept beside the best
    log_every: int = 50  # steps
    task_weights: dict[str, float] = field(default_factory=dict)  # of the loss; 1.0 where not named
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    threads: int | None = None  # of torch, per rank; null: cores / ranks of this host


@dataclass
class Config:
    """What `python -m torchrank.train` composes; `run_dir` null means outputs/DATE/TIME."""

    model: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 42
    device: str = "auto"  # auto | cpu | cuda
    run_dir: str | None = None
    resume: bool = False
    tensorboard: bool = True


def check(config: Config) -> None:
    """What types cannot say. Raises ValueError."""
    settings = config.training
    for name in ("batch_size", "log_every", "validate_every", "validation_rows", "checkpoint_every", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"training.{name}={value}: accepted are whole numbers from 1 on")
    unknown = sorted(set(settings.task_weights) - set(config.data.labels))
    if unknown:
        raise ValueError(f"training.task_weights names {unknown[0]!r}; the tasks are: {', '.join(config.data.labels)}")
    if settings.early_stopping.patience and config.data.valid is None:
        raise ValueError("training.early_stopping.patience needs validations, but data.valid is null")
