"""The fp16 and int8 variants of a dense graph, held to gates on rows that the model was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx

from export.example_inputs import in_memory
from export.fp16 import beyond_fp16, to_fp16
from export.int8 import matrix_layers, to_int8, worth_quantizing
from export.validation import Rows, aucs, largest_difference

AUC_GATE = {"fp16": 1e-4, "int8": 5e-4}  # of |AUC - fp32's|, each task
_NO_NUMBERS = "its scores are not all numbers"


class NoVariant(ValueError):
    """A precision that this graph cannot have at all; says why."""


@dataclass(frozen=True)
class Made:
    """A variant's graph and what it was measured to do; `misfit`: the gate it is over, None where it is over none."""

    name: str
    graph: onnx.ModelProto
    fp32_nodes: tuple[str, ...]
    auc_diff: dict[str, float]
    misfit: str | None


class VariantMaker:
    def __init__(
        self,
        graph: onnx.ModelProto,
        validation: Rows,
        golden: Rows,
        tolerance: Callable[[str], float],
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`graph`: the fp32 one. `tolerance`: of golden scores, by the variant's name."""
        self._graph, self._validation, self._golden = graph, validation, golden
        self._tolerance, self._tell = tolerance, tell
        self._session = in_memory(graph)
        self.auc = aucs(validation, validation.scores(self._session))

    def make(self, name: str) -> Made:
        """`fp16` or `int8`. Raises NoVariant where there is nothing that could be written."""
        try:
            return self._fp16() if name == "fp16" else self._int8()
        except NoVariant:
            raise
        except Exception as error:  # a variant that fails must not cost the export; ONNX Runtime's share no other base
            raise NoVariant(f"it cannot be made: {type(error).__name__}: {str(error).strip()}") from error

    def _fp16(self) -> Made:
        """Judged by what a CPU makes of its file, and by what a GPU would."""
        kept = beyond_fp16(self._graph, [*self._validation.feeds, *self._golden.feeds])
        if kept:
            self._tell(f"fp16: {len(kept)} nodes have values that fp16 does not hold, and stay fp32: {', '.join(kept)}")
        graph = to_fp16(self._graph, kept)
        judged = [self._judge("fp16", each) for each in (to_fp16(self._graph, kept, emulated=True), graph)]
        if any(misfit == _NO_NUMBERS for _, misfit in judged):
            raise NoVariant(_NO_NUMBERS)
        difference = {task: max((diff[task] for diff, _ in judged), key=abs) for task in self.auc}
        return Made("fp16", graph, kept, difference, next((misfit for _, misfit in judged if misfit), None))

    def _int8(self) -> Made:
        """Layers go back to fp32 until the gates are kept: first the one that changes golden scores most by itself."""
        all_layers = matrix_layers(self._graph)
        layers = [name for name, shape in all_layers.items() if worth_quantizing(shape)]
        if not layers:
            raise NoVariant("no matrix of the graph is large enough to gain by it")
        first = self._made_int8(layers)
        made, order = first, iter(self._worst_first(layers))
        while made.misfit is not None:
            layers.remove(next(order))
            if not layers:
                reason = f"{first.misfit}, and no choice of fewer layers keeps the gates"
                if first.misfit == _NO_NUMBERS:
                    raise NoVariant(reason)
                return replace(first, misfit=reason)
            made = self._made_int8(layers)
        return made

    def _made_int8(self, layers: list[str]) -> Made:
        graph = to_int8(self._graph, layers)
        difference, misfit = self._judge("int8", graph)
        return Made("int8", graph, tuple(n for n in matrix_layers(self._graph) if n not in layers), difference, misfit)

    def _worst_first(self, layers: list[str]) -> Iterator[str]:
        """By the root mean square of what the layer alone changes of golden scores."""
        exact = self._golden.scores(self._session)
        errors = {}
        for layer in layers:
            scores = self._golden.scores(in_memory(to_int8(self._graph, [layer])))
            errors[layer] = float(np.mean([np.mean(np.square(scores[task] - exact[task])) for task in exact]))
        yield from sorted(errors, key=lambda layer: -np.nan_to_num(errors[layer], nan=np.inf))

    def _judge(self, name: str, graph: onnx.ModelProto) -> tuple[dict[str, float], str | None]:
        """AUC minus fp32's per task, and the gate that the graph is over; no AUC where a score is not a number."""
        session = in_memory(graph)
        scores, golden = self._validation.scores(session), self._golden.scores(session)
        if not all(np.isfinite(values).all() for values in (*scores.values(), *golden.values())):
            return {}, _NO_NUMBERS
        found = aucs(self._validation, scores)
        difference = {task: found[task] - value for task, value in self.auc.items()}
        for task, value in difference.items():
            if abs(value) > AUC_GATE[name]:
                return difference, f"AUC of {task!r} changes by {value:+.1e}; the gate is {AUC_GATE[name]:g}"
        apart = largest_difference(golden, self._golden.wanted)
        if apart > self._tolerance(name):
            gate = f"the gate is {self._tolerance(name):g}"
            return difference, f"a golden score differs from the trainer's by {apart:.1e}; {gate}"
        return difference, None
