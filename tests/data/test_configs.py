"""conf/data and conf/features: every file composes, and its feature declaration loads."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from torchrank.config_dir import config_dir
from torchrank.data import CsvSource, ParquetSource
from torchrank.features.spec import load_feature_spec

NAMES = sorted(path.stem for path in (config_dir() / "data").glob("*.yaml"))


def composed(name, tmp_path):
    (tmp_path / "primary.yaml").write_text(
        f"hydra: {{searchpath: ['file://{config_dir()}']}}\ndefaults:\n  - data: ???\n  - _self_\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        return compose("primary", overrides=[f"data={name}", "data.path=/elsewhere"]).data


@pytest.fixture(params=NAMES)
def data(request, tmp_path):
    return composed(request.param, tmp_path)


def test_there_are_data_configurations():
    assert NAMES == ["census", "feed"]


def test_composes_and_builds(data):
    keys = ["features", "name", "path", "train", "valid", "test", "labels", "request_column", "user_column", "generate"]
    assert sorted(data) == sorted(keys)
    for split in ("train", "valid", "test"):
        source = instantiate(data[split])
        assert isinstance(source, ParquetSource | CsvSource)
        assert source.path == f"/elsewhere/{split}"
    spec = load_feature_spec(OmegaConf.to_container(data.features, resolve=True))
    assert not set(data.labels) & set(spec.used_columns())


def test_every_declared_column_is_used(data):
    spec = load_feature_spec(OmegaConf.to_container(data.features, resolve=True))
    assert list(spec.columns) == list(spec.used_columns())


def test_feed_is_generated_with_the_keys_of_its_configuration(tmp_path):
    generate = composed("feed", tmp_path).generate
    meta = instantiate(generate, output=str(tmp_path / "set"), days=3, rows_per_day=500, progress=False)
    assert meta["created"]
    assert meta["parameters"]["users"] == generate.users
