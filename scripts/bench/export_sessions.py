"""A graph in ONNX Runtime, and what it is timed by. Imports no torch: a session's memory is measured with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Feed = Mapping[str, NDArray[np.generic]]
Scores = list[NDArray[np.float32]]  # per task [N]
Side = Callable[[], Scores]

_WARM_UP = 3


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """With all of ONNX Runtime's optimisations; the same for every graph."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_onnx_runtime(session: ort.InferenceSession, feed: Feed) -> Side:
    own = {node.name: feed[node.name] for node in session.get_inputs()}
    return lambda: cast(Scores, session.run(None, own))


def medians_ms(sides: Mapping[str, Side], *, rounds: int, seconds: float | None = None) -> dict[str, float]:
    """In turn, A B A B …, so that whatever else the machine does meets all of them.

    seconds: about how long it may take; there are three rounds at least.
    """
    for _ in range(_WARM_UP):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for done in range(rounds):
        if seconds is not None and done >= 3 and time.perf_counter() - began > seconds:
            break
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) * 1e3 for name, values in times.items()}
