"""A small data set with a signal to learn, and configurations that train on it in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import torchrank.train  # noqa: F401 - registers the configuration schema
from torchrank.config_dir import config_dir

CONF = Path(__file__).parent / "training" / "conf"  # data/tiny.yaml


def make_rows(rows: int, seed: int) -> pa.Table:
    """Requests of 1 to 5 candidates; the labels follow user, item and whether the item's kind is in the history."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(rows), rng.integers(1, 6, rows))[:rows]
    requests = int(request[-1]) + 1
    user = rng.integers(0, 60, requests)
    history = [[f"i{k}" for k in rng.integers(0, 150, rng.integers(0, 9))] for _ in range(requests)]
    hour = rng.integers(0, 24, requests)
    item = rng.integers(0, 150, rows)
    seen = np.array([f"i{i}" in history[r] for i, r in zip(item, request, strict=True)])
    logit = np.sin(user[request]) + np.cos(item * 1.7) + 1.5 * seen - 0.5
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    finish = click & (rng.random(rows) < 0.4)
    return pa.table(
        {
            "request_id": request,
            "user_id": [f"u{u}" for u in user[request]],
            "age": (20 + user[request]).astype(np.float32),
            "history": [history[r] for r in request],
            "hour": hour[request],
            "item_id": [f"i{i}" for i in item],
            "tags": [[f"t{i % 7}", f"t{i % 11}"][: i % 3] for i in item],
            "price": rng.gamma(2, 2, rows).astype(np.float32),
            "click": click.astype(np.int8),
            "finish": finish.astype(np.int8),
        }
    )


def write_data(folder: Path) -> Path:
    pq.write_table(make_rows(4096, seed=1), folder / "train.parquet", row_group_size=500)
    pq.write_table(make_rows(1500, seed=2), folder / "valid.parquet", row_group_size=700)
    return folder


def compose_tiny(data: Path, run: Path, *overrides: str) -> DictConfig:
    base = [f"hydra.searchpath=[file://{CONF}]", "data=tiny", f"data.path={data}", f"run_dir={run}"]
    small = ["training.batch_size=128", "training.log_every=1", "training.threads=1", "tensorboard=false"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=[*base, *small, *overrides])
