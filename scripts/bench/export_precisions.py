"""The fp16 and int8 graphs of a benchmark's model, held to the gates of `torchrank export` on made-up clicks."""

from __future__ import annotations

import numpy as np
import onnx

from export.precisions import NoVariant, VariantMaker
from export.validation import Rows
from scripts.bench.export_models import random_request, torch_scores
from scripts.bench.export_training import Clicks
from torchrank.features.schema import FeatureSchema
from torchrank.models import RankModel

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "int8": 1e-2}  # of a probability
_REQUESTS = 40  # of one user and 500 candidates

Variants = dict[str, tuple[onnx.ModelProto | None, str | None]]  # precision -> graph, why it would be refused


def make_variants(graph: onnx.ModelProto, model: RankModel, schema: FeatureSchema) -> Variants:
    clicks = Clicks(schema)
    feeds = [random_request(schema, users=1, candidates=500, seed=2_000_000 + n) for n in range(_REQUESTS)]
    labels = np.concatenate([clicks.draw(feed).numpy() for feed in feeds])
    golden = feeds[:2]
    wanted = [np.concatenate(parts) for parts in zip(*(torch_scores(model, schema, f) for f in golden), strict=True)]
    maker = VariantMaker(
        graph,
        Rows(feeds, dict.fromkeys(schema.tasks, labels)),
        Rows(golden, dict(zip(schema.tasks, wanted, strict=True))),
        TOLERANCE.__getitem__,
        print,
    )
    found: Variants = {}
    for precision in ("fp16", "int8"):
        try:
            made = maker.make(precision)
        except NoVariant as error:
            found[precision] = (None, str(error))
        else:
            found[precision] = (made.graph, made.misfit)
    return found
