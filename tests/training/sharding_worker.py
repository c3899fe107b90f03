"""One rank of test_sharding.py: trains with every kind of sharding in turn and saves what the model then says.

python -m tests.training.sharding_worker DATA OUTPUT, under torchrun for several ranks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from tests.tiny import compose_tiny
from torchrank.train import train_on
from torchrank.training.distributed import Ranks, process_group
from torchrank.training.load import load_run
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run, typed

MMOE = ("+model=mmoe", "model.attention={history: item_id}", "model.dropout=0")  # dropout differs by rank
# Two embedding groups, dims that only data_parallel takes, and every kind in one run.
MIXED = (
    "+model={_target_: tests.wide_model.WideAndDeep}",
    "+sharding.tables={item_id: data_parallel, last_two: row_wise, user_id: column_wise, tags: table_wise}",
)
KINDS = ("data_parallel", "table_wise", "row_wise", "column_wise", "auto")
RULES = ("adagrad", "sgd", "rowwise_adagrad")


def main(data: Path, output: Path) -> None:
    quiet_libraries()
    with process_group("cpu", threads=1) as ranks:
        train_all(ranks, data, output)


def train_all(ranks: Ranks, data: Path, output: Path) -> None:
    for kind in KINDS:
        for rule in RULES if kind == "row_wise" else RULES[:1]:
            name = f"{kind}-{rule}"
            overrides = (*MMOE, f"sharding={kind}", f"optimizer.tables.name={rule}")
            train_and_score(ranks, overrides, data, output / name)
    train_and_score(ranks, MIXED, data, output / "mixed")


def train_and_score(ranks: Ranks, overrides: tuple[str, ...], data: Path, folder: Path) -> None:
    composed = compose_tiny(
        data,
        folder,
        *overrides,
        "optimizer.dense.lr=1e-3",  # small rates: rounding of different sums grows with every step
        "optimizer.tables.lr=0.02",
        "training.shuffle=false",
        "training.max_steps=20",
        "training.checkpoint_every=20",
    )
    config = typed(composed)
    assert train_on(ranks, config, composed).step == 20
    loaded = load_run(Run(folder), ranks)
    scores: list[np.ndarray] = []
    loaded.scores(config.data.valid, (), lambda batch, probabilities: scores.append(probabilities))
    gathered = ranks.gather(torch.from_numpy(np.concatenate(scores)))
    if gathered is not None:
        np.save(folder / "scores.npy", gathered.numpy())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]
        np.save(folder / "losses.npy", np.array(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
