"""Every YAML under conf/ composes and builds, and what a user may type is what it was."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import torchrank.train  # noqa: F401 - registers the configuration schema
from torchrank.config_dir import config_dir
from torchrank.data.source import Source
from torchrank.features.spec import load_feature_spec
from torchrank.models import RankModel
from torchrank.training.config import Config, DataConfig, ShardingChoice
from torchrank.training.module import build_model, feature_schema
from torchrank.training.run import typed
from torchrank.training.sharding import replicated_tables

FILES = sorted(path.relative_to(config_dir()).with_suffix("") for path in config_dir().rglob("*.y*ml"))
GROUPS = {group: [path.name for path in FILES if path.parent == Path(group)] for group in ("model", "data", "sharding")}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def test_every_file_is_of_a_kind_that_is_tested_here() -> None:
    assert {str(path.parent) for path in FILES} == {".", "model", "data", "features", "sharding"}
    assert [path.name for path in FILES if str(path.parent) == "."] == ["train"]
    assert all(GROUPS.values())


@pytest.mark.parametrize(("model", "data"), list(itertools.product(GROUPS["model"], GROUPS["data"])))
def test_every_model_builds_on_every_data_set(model: str, data: str) -> None:
    config = typed(composed(f"+model={model}", f"data={data}", "data.path=/elsewhere"))
    spec, schema = feature_schema(config)
    assert schema.tasks == tuple(config.data.labels)
    read = {slot.feature for slot in (*schema.user_pooled, *schema.item_pooled, *schema.sequences)}
    assert read | {*schema.user_dense, *schema.item_dense} == {feature.name for feature in spec.features}
    built = build_model(config, schema)
    assert isinstance(built, RankModel)
    assert sum(parameter.numel() for parameter in built.parameters()) > 1000
    for split in (config.data.train, config.data.valid, config.data.test):
        assert split is not None
        assert isinstance(instantiate(split), Source)


@pytest.mark.parametrize("name", [path.name for path in FILES if path.parent == Path("features")])
def test_every_feature_file_is_declared_right_and_used(name: str) -> None:
    loaded = OmegaConf.to_container(OmegaConf.load(config_dir() / "features" / f"{name}.yaml"))
    assert load_feature_spec(loaded).features  # type: ignore[arg-type]
    users = [data for data in GROUPS["data"] if f"/features@features: {name}" in text("data", data)]
    assert users, f"no data set uses conf/features/{name}.yaml"


@pytest.mark.parametrize("name", GROUPS["sharding"])
def test_every_sharding_is_the_choice_it_is_named_after(name: str) -> None:
    config = typed(composed("+model=mmoe", f"sharding={name}"))
    assert config.sharding.default == ShardingChoice(name)
    tables = replicated_tables(feature_schema(config)[1], config.sharding)
    assert bool(tables) == (name == "data_parallel")


def test_every_sharding_choice_has_a_file() -> None:
    assert GROUPS["sharding"] == sorted(choice.value for choice in ShardingChoice)


def text(group: str, name: str) -> str:
    return (config_dir() / group / f"{name}.yaml").read_text()


# Key and default of everything that a user may type, `null` for what is open or has to be given: changed on purpose
# only, and then with an entry in CHANGELOG.
KEYS: dict[str, Any] = {
    "model": None,
    "data": {
        "name": "???",
        "path": "???",
        "train": "???",
        "valid": None,
        "test": None,
        "labels": "???",
        "request_column": None,
        "user_column": None,
        "generate": None,
        "features": "???",
    },
    "sharding": {"default": "auto", "tables": {}},
    "optimizer": {
        "dense": {"_target_": "torch.optim.Adam", "lr": 0.002},
        "tables": {"name": "adagrad", "lr": 0.1, "eps": 1e-08},
    },
    "training": {
        "epochs": 3,
        "max_steps": None,
        "batch_size": 2048,
        "shuffle": True,
        "validate_every": None,
        "validation_rows": None,
        "checkpoint_every": None,
        "keep_checkpoints": 2,
        "log_every": 50,
        "task_weights": {},
        "early_stopping": {"patience": 0, "min_delta": 0.0},
        "threads": None,
    },
    "seed": 42,
    "device": "auto",
    "run_dir": None,
    "resume": False,
    "tensorboard": True,
}


def test_keys_and_defaults_are_those_that_users_know() -> None:
    found = json.loads(json.dumps(asdict(Config())))
    assert list(found) == list(KEYS)  # in this order they are saved and shown
    assert found == KEYS


def test_every_closed_key_is_typed() -> None:
    """A mistake in a value is told where it is made, not deep in a training."""

    def check(kind: Any) -> None:
        for field in fields(kind):
            if is_dataclass(value := getattr(kind(), field.name)):
                check(type(value))
            elif kind is not DataConfig and field.name not in ("model", "dense"):
                assert "Any" not in str(field.type), f"{kind.__name__}.{field.name}"

    check(Config)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.epoch=2", ["Could not override 'training.epoch'", "Key 'epoch' not in 'TrainingConfig'"]),
        ("training.early_stopping.patients=2", ["training.early_stopping.patients"]),
        ("optimizer.table.lr=1", ["Could not override 'optimizer.table.lr'", "Key 'table' not in 'OptimizerConfig'"]),
        ("data.label=[x]", ["Key 'label' not in 'DataConfig'"]),
        ("sharding=rowwise", ["Could not find 'sharding/rowwise'", *GROUPS["sharding"]]),
        ("data=feeds", ["Could not find 'data/feeds'", *GROUPS["data"]]),
        ("+model=mmeo", ["Could not find 'model/mmeo'", *GROUPS["model"]]),
        ("sharding.default=rowwise", ["'rowwise'", *GROUPS["sharding"]]),
        ("+sharding.tables.item_id=rowwise", ["sharding.tables.item_id", *GROUPS["sharding"]]),
        ("optimizer.tables.name=adam", ["optimizer.tables.name", "sgd", "adagrad", "rowwise_adagrad"]),
        ("training.batch_size=many", ["training.batch_size", "'many'", "Integer"]),
        ("training.shuffle=perhaps", ["training.shuffle", "'perhaps'", "bool"]),
        ("sede=3", ["Could not override 'sede'"]),
    ],
)
def test_a_typo_is_told_with_its_key_and_the_choices(override: str, named: list[str]) -> None:
    with pytest.raises((ConfigCompositionException, OmegaConfBaseException, ValueError)) as caught:
        typed(composed("+model=mmoe", override) if "model" not in override else composed(override))
    told = f"{caught.value} {caught.value.__cause__}"
    for part in named:
        assert part in told, told


def test_what_the_schema_cannot_know_is_told_by_name() -> None:
    with pytest.raises(ValueError, match=r"no model is chosen: add \+model=NAME; there are: dnn, mmoe"):
        feature_schema(typed(composed()))
    config = typed(composed("+model={_target_: torch.nn.Linear}"))
    with pytest.raises(ValueError, match=r"model\._target_ is Linear, which is not a torchrank\.models\.RankModel"):
        feature_schema(config)
    config = typed(composed("+model=mmoe", "+model.expert=3"))
    with pytest.raises(ValueError, match=r"model: .*unexpected keyword argument 'expert'"):
        build_model(config, feature_schema(config)[1])
