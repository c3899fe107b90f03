"""The parity gate: a bundle is what the trainer trained, or it is not written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedding_store.lookup import EmbeddingLookup
from export.bundle import Golden, Manifest
from export.session import Scorer
from torchrank.features.transform import FeatureTransform

_SHOWN_ROWS = 5


class ParityError(ValueError):
    """The bundle's scores are not the trainer's; shows the worst rows."""


def check_parity(
    bundle: Path, manifest: Manifest, variant: str, golden: Sequence[Golden], lookup: EmbeddingLookup
) -> float:
    """The largest |bundle's score - trainer's| over all golden rows and tasks, from raw values on, as a service would.

    Raises ParityError where it is above the variant's tolerance (or not a number).
    """
    transform = FeatureTransform(manifest.features)
    scorer = Scorer(bundle, lookup, variant=variant)
    rows = []
    for number, request in enumerate(golden):
        features = transform.from_request(request.user, request.context, request.candidates)
        scores = scorer.score(features).tasks
        for task, expected in request.scores.items():
            rows += [
                (abs(float(found) - wanted), number, candidate, task, wanted, float(found))
                for candidate, (found, wanted) in enumerate(zip(scores[task], expected, strict=True))
            ]
    tolerance = manifest.variant(variant).tolerance
    wrong = [row for row in rows if not row[0] <= tolerance]  # `not <=` also catches NaN
    if wrong:
        worst = sorted(wrong, key=lambda row: -np.nan_to_num(row[0], nan=np.inf))[:_SHOWN_ROWS]
        lines = "\n".join(
            f"  golden request {number}, candidate {candidate}, {task}: trainer {wanted:.6f}, bundle {found:.6f}"
            for _, number, candidate, task, wanted, found in worst
        )
        raise ParityError(
            f"variant {variant}: {len(wrong)} of {len(rows)} golden scores differ from the trainer's by more than "
            f"{tolerance:g}; nothing is written. The worst:\n{lines}"
        )
    return max(row[0] for row in rows)
