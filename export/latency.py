"""How long the variants of a bundle take on this host."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export.example_inputs import random_feed
from export.optimize import TYPICAL

_ROUNDS = 21


def latencies_ms(files: dict[str, Path]) -> dict[str, float]:
    """Median per name, one thread, one user with 500 candidates of random inputs; taken in turn, so that what else the
    host does meets all alike."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    sessions = {
        name: ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for name, file in files.items()
    }
    feeds = {name: random_feed(session.get_inputs(), **TYPICAL, seed=0) for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(_ROUNDS):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, feeds[name])
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(taken) * 1e3) for name, taken in seconds.items()}
