"""Census-Income: test AUC and time of MMoE as `torchrank train` trains it by default, over seeds, beside gradient
boosting (scikit-learn) on the same columns.

python scripts/bench/census.py --source DIR [--seeds 3] [--json]

DIR holds UCI's files. Published figures for MMoE with education as an input (Torch-RecHub): income 0.9579, never
married 0.9950; the MMoE paper (KDD'18), without education: 0.9410 and 0.9926.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

TASKS = ("income", "never_married")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "census"
        torchrank("data", "census", "--source", str(options.source), "--output", str(data))
        runs = [train(data, Path(folder) / f"seed-{seed}", seed) for seed in range(options.seeds)]
        trees = boosting(data)
    show(runs, trees)
    if options.json:
        print(json.dumps(result(runs, trees)))


def train(data: Path, run: Path, seed: int) -> dict[str, float]:
    begin = time.perf_counter()
    torchrank("train", "+model=mmoe", "data=census", f"data.path={data}", f"run_dir={run}", f"seed={seed}")
    seconds = time.perf_counter() - begin
    metrics = json.loads(torchrank("evaluate", "--run", str(run), "--json").splitlines()[-1])
    return {"seconds": seconds, **{task: metrics[task]["auc"] for task in TASKS}}


def boosting(data: Path) -> dict[str, float]:
    """300 trees a task; strings as categories, numbers as they are."""
    begin = time.perf_counter()
    train, test = (pq.read_table(data / split) for split in ("train", "test"))
    rows = pa.concat_tables([train, test])
    columns = [rows.column(name).combine_chunks() for name in rows.column_names if name not in TASKS]
    texts = [pa.types.is_string(column.type) for column in columns]
    codes = [c.dictionary_encode().indices if text else c for c, text in zip(columns, texts, strict=True)]
    values = np.column_stack([column.to_numpy(zero_copy_only=False) for column in codes])
    aucs = {}
    for task in TASKS:
        labels = rows.column(task).to_numpy()
        model = HistGradientBoostingClassifier(max_iter=300, learning_rate=0.08, categorical_features=texts)
        scores = model.fit(values[: len(train)], labels[: len(train)]).predict_proba(values[len(train) :])[:, 1]
        aucs[task] = float(roc_auc_score(labels[len(train) :], scores))
    return {"seconds": time.perf_counter() - begin, **aucs}


def show(runs: list[dict[str, float]], trees: dict[str, float]) -> None:
    table = Table("", *(f"{task} AUC" for task in TASKS), "seconds")
    for seed, run in enumerate(runs):
        table.add_row(f"MMoE, seed {seed}", *(f"{run[task]:.4f}" for task in TASKS), f"{run['seconds']:.0f}")
    spread = [f"{np.ptp([run[task] for run in runs]):.4f}" for task in TASKS]
    table.add_row("spread", *spread, "")
    table.add_row("gradient boosting", *(f"{trees[task]:.4f}" for task in TASKS), f"{trees['seconds']:.0f}")
    Console().print(table)


def result(runs: list[dict[str, float]], trees: dict[str, float]) -> dict[str, Any]:
    means = {task: float(np.mean([run[task] for run in runs])) for task in TASKS}
    return {
        "runs": runs,
        "mean": means,
        "spread": {task: float(np.ptp([run[task] for run in runs])) for task in TASKS},
        "boosting": trees,
        "auc_vs_boosting": {task: means[task] / trees[task] for task in TASKS},
    }


def torchrank(*arguments: str) -> str:
    command = [sys.executable, "-m", "torchrank.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"torchrank {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
