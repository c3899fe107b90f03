"""The parity gate: a bundle is what the trainer trained, or it is not written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedding_store.lookup import EmbeddingLookup
from export.bundle import Golden, Manifest
from export.session import Scorer
from torchrank.features.transform import FeatureTransform

_SHOWN_ROWS = 5


class ComparedScore(NamedTuple):
    request: int
    candidate: int
    task: str
    wanted: float  # the trainer's
    found: float  # the bundle's

    @property
    def difference(self) -> float:
        return abs(self.found - self.wanted)


class ParityError(ValueError):
    """The bundle's scores are not the trainer's; shows the worst rows."""


def check_parity(
    bundle: Path, manifest: Manifest, variant: str, golden: Sequence[Golden], lookup: EmbeddingLookup
) -> float:
    """`golden_difference`. Raises ParityError where it is above the variant's tolerance (or not a number)."""
    rows = compared(bundle, manifest, variant, golden, lookup)
    tolerance = manifest.variant(variant).tolerance
    wrong = [row for row in rows if not row.difference <= tolerance]  # `not <=` also catches NaN
    if wrong:
        worst = sorted(wrong, key=lambda row: -np.nan_to_num(row.difference, nan=np.inf))[:_SHOWN_ROWS]
        lines = "\n".join(
            f"  golden request {row.request}, candidate {row.candidate}, {row.task}: "
            f"trainer {row.wanted:.6f}, bundle {row.found:.6f}"
            for row in worst
        )
        raise ParityError(
            f"variant {variant}: {len(wrong)} of {len(rows)} golden scores differ from the trainer's by more than "
            f"{tolerance:g}; nothing is written. The worst:\n{lines}"
        )
    return max(row.difference for row in rows)


def golden_difference(
    bundle: Path, manifest: Manifest, variant: str, golden: Sequence[Golden], lookup: EmbeddingLookup
) -> float:
    """The largest |bundle's score - trainer's| over all golden rows and tasks; NaN where a score is NaN."""
    return float(np.max([row.difference for row in compared(bundle, manifest, variant, golden, lookup)]))


def compared(
    bundle: Path, manifest: Manifest, variant: str, golden: Sequence[Golden], lookup: EmbeddingLookup
) -> list[ComparedScore]:
    """Every golden score beside the bundle's, from raw values on, as a service would."""
    transform = FeatureTransform(manifest.features)
    scorer = Scorer(bundle, lookup, variant=variant)
    rows = []
    for number, request in enumerate(golden):
        features = transform.from_request(request.user, request.context, request.candidates)
        scores = scorer.score(features).tasks
        for task, expected in request.scores.items():
            rows += [
                ComparedScore(number, candidate, task, wanted, float(found))
                for candidate, (found, wanted) in enumerate(zip(scores[task], expected, strict=True))
            ]
    return rows
