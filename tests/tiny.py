"""A small data set with a signal to learn, and configurations that train on it in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed.checkpoint as dcp
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import torchrank.train  # noqa: F401 - registers the configuration schema
from torchrank.config_dir import config_dir
from torchrank.training.run import Run

CONF = Path(__file__).parent / "training" / "conf"  # data/tiny.yaml
SMALL = ("training.batch_size=128", "training.log_every=1", "training.threads=1", "tensorboard=false")


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
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=[*base, *SMALL, *overrides])


def run_module(module: str, *arguments: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` in `cwd`, under torchrun where there are several ranks."""
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "--"]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parents[2])}
    return subprocess.run(
        [*launch, module, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train_on_ranks(ranks: int, data: Path, run: Path, *overrides: str) -> None:
    """The real entry point; `overrides` as in `compose_tiny`."""
    done = run_module(
        "torchrank.train",
        *("--config-dir", str(CONF), "data=tiny", f"data.path={data}", f"run_dir={run}", *SMALL, *overrides),
        cwd=run.parent,
        ranks=ranks,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def copy_run(run: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None] = lambda state: None) -> Path:
    """The run with its checkpoint read, edited and written again: state-dict key -> whole tensor."""
    checkpoint = Run(run).checkpoint()
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in saved.items()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    edit(state)
    dcp.save(state, checkpoint_id=target / "checkpoints" / checkpoint.name, no_dist=True)
    for name in ("config.yaml", f"checkpoints/{checkpoint.name}/progress.json"):
        shutil.copy(run / name, target / name)
    return target
