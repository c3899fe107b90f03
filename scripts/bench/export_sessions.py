"""A graph in ONNX Runtime, and what it is timed by. Imports no torch: a session's memory is measured with it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Feed = Mapping[str, NDArray[np.generic]]
Scores = list[NDArray[np.float32]]  # per task [N]
Side = Callable[[], Scores]
Key = TypeVar("Key", bound=Hashable)

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


class Elapsed(NamedTuple):
    """Milliseconds. `cpu` is the process's own time, which other work on the machine does not add to."""

    wall: float
    cpu: float


def medians(sides: Mapping[Key, Side], *, rounds: int, seconds: float | None = None) -> dict[Key, Elapsed]:
    """All sides in turn, each round in another order, so that whatever else the machine does, and what a side leaves
    in its caches, meets all of them.

    seconds: about how long it may take; there are three rounds at least.
    """
    for _ in range(_WARM_UP):
        for run in sides.values():
            run()
    names, rng = list(sides), random.Random(0)
    times: dict[Key, list[tuple[float, float]]] = {name: [] for name in names}
    began = time.perf_counter()
    for done in range(rounds):
        if seconds is not None and done >= 3 and time.perf_counter() - began > seconds:
            break
        rng.shuffle(names)
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Elapsed(*(float(v) * 1e3 for v in np.median(values, axis=0))) for name, values in times.items()}


def medians_ms(sides: Mapping[Key, Side], *, rounds: int, seconds: float | None = None) -> dict[Key, float]:
    """The same by the clock on the wall alone."""
    return {name: elapsed.wall for name, elapsed in medians(sides, rounds=rounds, seconds=seconds).items()}
