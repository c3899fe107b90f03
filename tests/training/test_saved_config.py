"""What a run saves of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from torchrank.training.run import Run, typed

Composed = Callable[..., DictConfig]


def test_the_saved_configuration_is_the_composed_one(composed: Composed, tmp_path: Path) -> None:
    configuration = composed("sharding=row_wise", "+sharding.tables.item_id=column_wise", "optimizer.dense.lr=0.5")
    run = Run(tmp_path / "run")
    run.create(configuration)
    assert run.config() == typed(configuration)
    assert "${" not in (run.folder / "config.yaml").read_text()  # it means the same wherever it is read


def test_secrets_out_of_the_environment_are_not_saved(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_PASSWORD", "hunter2")
    monkeypatch.setenv("SEED", "7")
    overrides = (
        "+data.train.password=${oc.env:SOURCE_PASSWORD}",
        "+data.train.url=s3://me:${data.train.password}@host/${data.name}",
        "+data.valid.passwords=[plain,'${data.train.password}']",
        "+data.valid.password=${data.train.password}",
        "seed=${oc.env:SEED}",
    )
    configuration = composed(*overrides)
    run = Run(tmp_path / "run")
    run.create(configuration)
    assert "hunter2" not in (run.folder / "config.yaml").read_text()
    config = run.config()
    assert config == typed(configuration)
    assert config.data.train["url"] == "s3://me:hunter2@host/tiny"
    assert config.seed == 7
    monkeypatch.delenv("SOURCE_PASSWORD")
    with pytest.raises(ValueError, match="Environment variable 'SOURCE_PASSWORD' not found"):
        run.config()
