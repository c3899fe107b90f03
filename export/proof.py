"""Whether a graph gives the scores of another one: on random inputs of requests of several kinds."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from export.example_inputs import TYPICAL, Feed, Lengths, in_memory, random_feed
from export.flops import count_flops

TOLERANCE = 1e-5  # of a probability of a half; p is allowed 4 p (1 - p) times that, so that rare events are held too
_LEAST = 1e-3  # of those 4 p (1 - p)
_ROUNDED = 4 * np.finfo(np.float32).eps  # near 1 probabilities have no finer steps than that
_WIDE = 10  # times the tolerance, for inputs that are ten times as large: sums of them are rounded more coarsely
# users, candidates, deviation of the inputs, lengths of the sequences
_REQUESTS: tuple[tuple[int, int, float, Lengths], ...] = (
    (1, 1, 0.1, "any"), (1, 64, 0.1, "any"), (3, 41, 0.1, "any"), (8, 8, 0.1, "any"), (1, 9, 0.1, "none"),
    (1, 9, 0.1, "full"), (2, 30, 1.0, "any"), (1, TYPICAL["candidates"], 0.1, "any"),
)  # fmt: skip


class Proof:
    """A graph, its outputs for those requests, and its figures. Two are compared that were given the same `feeds`."""

    def __init__(self, model: onnx.ModelProto, feeds: list[tuple[Feed, float]] | None = None) -> None:
        """feeds: of the graph before, each with its tolerance."""
        self.model = model
        self.session = in_memory(model)
        self.outputs = [node.name for node in self.session.get_outputs()]
        inputs = {node.name for node in self.session.get_inputs()}
        self.feeds = self._feeds() if feeds is None else feeds
        self.scores: list[list[NDArray[np.float32]]] = [
            self.session.run(self.outputs, {name: feed[name] for name in inputs}) for feed, _ in self.feeds
        ]
        self.nodes = len(model.graph.node)
        self.flops = count_flops(model, **TYPICAL)

    def refuted(self, before: Proof) -> str | None:
        """What shows that the scores are others than those of `before`; None where nothing does."""
        if self.outputs != before.outputs:
            return f"its graph's outputs are {', '.join(self.outputs)} instead of {', '.join(before.outputs)}"
        for (_, tolerance), mine, theirs in zip(self.feeds, self.scores, before.scores, strict=True):
            for name, one, two in zip(self.outputs, mine, theirs, strict=True):
                if one.shape != two.shape:
                    return f"its graph's {name} is {list(one.shape)} instead of {list(two.shape)}"
                apart = np.abs(one - two)
                allowed = tolerance * _scale(two) + _ROUNDED * np.abs(two)
                wrong = ~((apart <= allowed) | (np.isnan(one) & np.isnan(two)))
                if wrong.any():
                    return f"its graph's scores of {name} differ by up to {apart[wrong].max():.2g}"
        return None

    def difference(self, before: Proof) -> float:
        """The largest between the outputs, where both are numbers."""
        pairs = (pair for both in zip(self.scores, before.scores, strict=True) for pair in zip(*both, strict=True))
        return max((float(np.nanmax(np.abs(one - two), initial=0.0)) for one, two in pairs), default=0.0)

    def _feeds(self) -> list[tuple[Feed, float]]:
        return [
            (
                random_feed(
                    self.session.get_inputs(), users=users, candidates=candidates, seed=seed, deviation=deviation,
                    lengths=lengths,
                ),
                TOLERANCE * (_WIDE if deviation > 0.1 else 1),
            )
            for seed, (users, candidates, deviation, lengths) in enumerate(_REQUESTS)
        ]  # fmt: skip


def _scale(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """4 p (1 - p) of probabilities; of what are none, the size of the largest."""
    found = np.empty_like(scores)
    if ((scores >= 0) & (scores <= 1) | np.isnan(scores)).all():
        np.maximum(4 * scores * (1 - scores), _LEAST, out=found)
    else:
        found[...] = np.nanmax(np.abs(scores))
    return found
