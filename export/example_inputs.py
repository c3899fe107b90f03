"""Random inputs for a dense graph of any model: to prove passes on, to time variants with. Imports no onnx."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

Feed = dict[str, NDArray[np.generic]]
Lengths = Literal["any", "none", "full"]  # of sequences

TYPICAL = {"users": 1, "candidates": 500}  # the request that FLOPs and latency are of


def random_feed(
    inputs: Iterable[ort.NodeArg],
    *,
    users: int,
    candidates: int,
    seed: int,
    deviation: float = 0.1,
    lengths: Lengths = "any",
) -> Feed:
    """A feed of the inputs of a session (`session.get_inputs()`): U = `users`, N = `candidates`.

    Floats are normal, by default as small as embeddings are; padding of sequences is zeros, as the store fills it. Of
    several rows, one has an empty sequence and one a full one. Candidates of a user are neighbours.
    """
    rng = np.random.default_rng(seed)
    nodes = {node.name: node for node in inputs}
    sizes = {"U": users, "N": candidates}
    feed: Feed = {}
    for name, node in nodes.items():
        shape = [sizes.get(dim, dim) for dim in node.shape]
        if name == "user_index":
            feed[name] = np.sort(rng.integers(0, users, candidates))
        elif not name.endswith(".length"):
            kind = np.float16 if node.type == "tensor(float16)" else np.float32
            feed[name] = (deviation * rng.standard_normal(shape, np.float32)).astype(kind)
    for name, node in nodes.items():
        if name.endswith(".length"):
            keys = feed.get(name.removesuffix(".length"))
            longest = keys.shape[1] if keys is not None else 8
            feed[name] = length = _lengths(rng, sizes[node.shape[0]], longest, lengths)
            if keys is not None:
                keys[np.arange(longest) >= length[:, np.newaxis]] = 0
    return feed


def _lengths(rng: np.random.Generator, rows: int, longest: int, lengths: Lengths) -> NDArray[np.int64]:
    if lengths != "any":
        return np.full(rows, 0 if lengths == "none" else longest, np.int64)
    found = rng.integers(0, longest + 1, rows)
    if rows > 1:
        found[0], found[-1] = 0, longest
    return found


def in_memory(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    """A session of a graph that has no file (yet). Raises ONNX Runtime's own errors."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
