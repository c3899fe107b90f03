"""Ranker: raw values in, scores and an order out. A plain class: any server, or a script, can call it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from export.session import Scorer, Scores
from torchrank.features.transform import FeatureTransform
from torchrank.serving.messages import BadRequest, RankRequest, RankResponse


class DeadlineExceeded(TimeoutError):
    """The time a request was given ran out before its embeddings were asked for."""


class NonFiniteScores(ValueError):
    """The graph answered NaN or infinity: no order can be made of that."""


def _unobserved(stage: str, seconds: float) -> None:
    pass


class Ranker:
    """Thread-safe. `observe` is told how many seconds each stage of each request took."""

    def __init__(
        self,
        scorer: Scorer,
        transform: FeatureTransform,
        *,
        max_candidates: int = 5000,
        observe: Callable[[str, float], None] = _unobserved,
    ) -> None:
        self.scorer = scorer
        self.release = scorer.release
        self.tasks = scorer.manifest.schema.tasks
        self.max_candidates = max_candidates
        self._transform = transform
        self._observe = observe

    def rank(self, request: RankRequest, *, timeout: float | None = None) -> RankResponse:
        """`timeout`: seconds until the caller stops waiting; what the features leave of it bounds the look-up.

        Raises BadRequest and FeatureError (the request is wrong), DeadlineExceeded, StoreUnavailable,
        NonFiniteScores.
        """
        order_by = self._check(request)
        started = time.monotonic()
        features = self._transform.from_request(request.user, request.context, request.candidates)
        transformed = time.monotonic()
        self._observe("features", transformed - started)
        left = None if timeout is None else timeout - (transformed - started)
        if left is not None and left <= 0:
            raise DeadlineExceeded(f"the features took {transformed - started:.3f} s: no time left for the look-up")
        reply = self.scorer.fetch(features, timeout=left)
        fetched = time.monotonic()
        self._observe("lookup", fetched - transformed)
        scores = self.scorer.run(features, reply)
        self._observe("graph", time.monotonic() - fetched)
        return self._response(scores, order_by)

    def _check(self, request: RankRequest) -> str:
        n = len(request.candidates)
        if not 1 <= n <= self.max_candidates:
            raise BadRequest("candidates", f"found {n}, accepted are 1 to {self.max_candidates}")
        order_by = self.tasks[0] if request.order_by is None else request.order_by
        if order_by not in self.tasks:
            raise BadRequest("order_by", f"no task {order_by!r}; the tasks are: {', '.join(self.tasks)}")
        return order_by

    def _response(self, scores: Scores, order_by: str) -> RankResponse:
        for task, values in scores.tasks.items():
            if not np.isfinite(values).all():
                worst = int(np.flatnonzero(~np.isfinite(values))[0])
                raise NonFiniteScores(f"task {task!r}: the score of candidates[{worst}] is {values[worst]}")
        return RankResponse(
            release=scores.release,
            scores={task: values.tolist() for task, values in scores.tasks.items()},
            order=np.argsort(-scores.tasks[order_by], kind="stable").tolist(),  # equal scores keep the request's order
            absent=scores.absent,
            unavailable=scores.unavailable,
            stale=scores.stale,
        )
