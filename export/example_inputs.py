"""Random inputs for a dense graph of any model: to prove passes on, to time variants with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

Feed = dict[str, NDArray[np.generic]]

_DEVIATION = 0.1


def random_feed(inputs: Iterable[ort.NodeArg], *, users: int, candidates: int, seed: int) -> Feed:
    """A feed of the inputs of a session (`session.get_inputs()`): U = `users`, N = `candidates`.

    Floats are normal and as small as embeddings are, padding of sequences is zeros, as the store fills it; lengths go
    from 0 to the limit, and candidates of a user are neighbours.
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
            feed[name] = (_DEVIATION * rng.standard_normal(shape, np.float32)).astype(kind)
    for name, node in nodes.items():
        if name.endswith(".length"):
            keys = feed.get(name.removesuffix(".length"))
            longest = keys.shape[1] if keys is not None else 8
            lengths = rng.integers(0, longest + 1, sizes[node.shape[0]])
            feed[name] = lengths
            if keys is not None:
                keys[np.arange(longest) >= lengths[:, np.newaxis]] = 0
    return feed


def in_memory(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    """A session of a graph that has no file (yet). Raises ONNX Runtime's own errors."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
