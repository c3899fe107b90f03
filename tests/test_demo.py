"""The demonstration on little data, its tables in a real Redis: every step runs and every figure is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.redis_server import RedisServer

ROOT = Path(__file__).parents[1]


FIGURES = (
    *("train.world_size", "train.samples_per_s", "auc.click", "auc.finish", "bundle.table_bytes"),
    *("auc_best_reachable.click", "auc_best_reachable.finish", "parity.max_abs_diff.fp32", "parity.max_abs_diff.fp16"),
    *("bundle.dense_bytes.fp32", "bundle.dense_bytes.fp16", "sidecar.hit_rate", "sidecar.p50_ms", "sidecar.p99_ms"),
    *("rank.candidates", "rank.p50_ms", "rank.p99_ms", "serving.sidecar_rss_bytes"),
)


def run_demo(store: str, folder: Path) -> dict[str, Any]:
    small = [
        "--data",
        str(folder / "feed"),
        "--rows-per-day",
        "3000",
        "--epochs",
        "1",
        "--output",
        str(folder / "demo"),
    ]
    command = [sys.executable, str(ROOT / "scripts/demo.py"), "--store", store, *small]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "From raw columns to a ranked list" in done.stdout
    summary: dict[str, Any] = json.loads((folder / "demo" / "summary.json").read_text())
    return summary


def test_the_whole_path(redis_server: RedisServer, tmp_path: Path) -> None:
    summary = run_demo(redis_server.url, tmp_path)
    for figure in FIGURES:
        value: Any = summary
        for part in figure.split("."):
            value = value[part]
        assert value > 0, figure
    assert summary["train"]["world_size"] == 2
    assert summary["rank"]["candidates"] == 500
    assert summary["parity"]["max_abs_diff"]["fp32"] <= 1e-5
    assert summary["parity"]["max_abs_diff"]["fp16"] <= 2e-3
    for task, auc in summary["auc"].items():
        assert 0.5 < auc < summary["auc_best_reachable"][task]
