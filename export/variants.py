"""Which of a bundle's variants is the fastest on this host. Imports no torch and no onnx."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export.bundle import InvalidBundle, Manifest
from export.example_inputs import TYPICAL, Feed, random_feed
from export.runtime import RUN_ERRORS, Provider, open_session

AUTO = "auto"  # in place of a variant's name: the fastest
_WARM_UP, _LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 5, 50, 1.0


class RunFailed(InvalidBundle):
    """A variant, `name`, that loads and does not run."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"a request of {TYPICAL['candidates']} candidates fails: {str(error).strip()}")
        self.name = name


@dataclass(frozen=True, slots=True)
class Timing:
    """`milliseconds`: the median of each variant that was timed, fastest first; `left_out`: why others were not."""

    milliseconds: dict[str, float]
    left_out: dict[str, str]

    @property
    def fastest(self) -> str:
        return next(iter(self.milliseconds))

    def __str__(self) -> str:
        times = [f"{name} {milliseconds:.3f} ms" for name, milliseconds in self.milliseconds.items()]
        return "; ".join([", ".join(times), *(f"{name} is left out: {why}" for name, why in self.left_out.items())])


def time_variants(
    bundle: Path, manifest: Manifest, *, provider: Provider = "cpu", threads: int = 1, spin: bool = False
) -> Timing:
    """Runs each variant that passed its gate on random inputs, in turn, for about a second in all.

    All of them are in memory for that time. One that does not load or run here is left out. Raises InvalidBundle where
    none is left, and UnfitRuntime.
    """
    left_out: dict[str, str] = {}
    sessions: dict[str, ort.InferenceSession] = {}
    for variant in manifest.variants:
        if not variant.passed:
            left_out[variant.name] = "it did not pass its gate when it was exported"
            continue
        try:
            sessions[variant.name] = open_session(bundle / variant.file, provider=provider, threads=threads, spin=spin)
        except InvalidBundle as error:
            left_out[variant.name] = str(error)
    medians: dict[str, float] = {}
    while sessions and not medians:
        try:
            medians = medians_ms(sessions)
        except RunFailed as failure:
            left_out[failure.name] = str(failure)
            del sessions[failure.name]
    if not medians:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise InvalidBundle(f"bundle {manifest.release} has no variant that can be taken by itself: {reasons}")
    return Timing(dict(sorted(medians.items(), key=lambda item: item[1])), left_out)


def medians_ms(sessions: dict[str, ort.InferenceSession]) -> dict[str, float]:
    """Of runs in turn, so that whatever else the host does is shared. Raises RunFailed."""
    users, candidates = TYPICAL["users"], TYPICAL["candidates"]
    feeds = {
        name: random_feed(session.get_inputs(), users=users, candidates=candidates, seed=0)
        for name, session in sessions.items()
    }
    for name, session in sessions.items():
        for _ in range(_WARM_UP):
            _run(name, session, feeds[name])
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + _SECONDS
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, session in sessions.items():
            began = time.perf_counter()
            _run(name, session, feeds[name])
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(taken) * 1e3) for name, taken in seconds.items()}


def _run(name: str, session: ort.InferenceSession, feed: Feed) -> None:
    try:
        session.run(None, feed)
    except RUN_ERRORS as error:
        raise RunFailed(name, error) from error
