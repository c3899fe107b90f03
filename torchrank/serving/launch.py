"""From options to a service that runs: opens the look-up, loads the bundle, serves, closes everything again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from embedding_store.client import SidecarClient
from embedding_store.degrade import DegradePolicy
from embedding_store.holding import Hold
from embedding_store.lookup import EmbeddingLookup
from embedding_store.open import open_store
from embedding_store.store import EmbeddingStore
from export.bundle import Manifest, read_golden, read_manifest
from export.example_inputs import TYPICAL
from export.runtime import Provider
from export.session import Scorer
from export.variants import AUTO, time_variants
from torchrank.features.transform import FeatureTransform
from torchrank.serving import server
from torchrank.serving.app import Service, build_app
from torchrank.serving.messages import RankRequest
from torchrank.serving.metrics import ServiceMetrics
from torchrank.serving.ranker import Ranker

logger = logging.getLogger("torchrank.serving")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `torchrank serve` takes. Exactly one of `sidecar` (address) and `store` (URL) is given."""

    bundle: Path
    sidecar: str | None
    sidecar_password: str | None = field(default=None, repr=False)
    store: str | None
    cache_bytes: int
    degrade: DegradePolicy = field(default_factory=DegradePolicy)
    host: str
    port: int
    variant: str  # or "auto": the fastest on this host
    provider: Provider = "cpu"
    threads: int  # of one graph run
    concurrency: int | None  # requests ranked at a time; None: as many as there are cores
    spin: bool
    max_candidates: int
    max_body_bytes: int
    timeout: float  # seconds
    drain: float  # seconds


def launch(options: Options, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; `announce` gets the line that says where."""
    manifest = read_manifest(options.bundle)
    options.degrade.check(manifest.release, (table.name for table in manifest.tables))
    with ExitStack() as resources:
        lookup = resources.enter_context(_open_lookup(options))
        scorer = _open_scorer(options, manifest, lookup)
        if isinstance(lookup, EmbeddingStore):  # a sidecar pins and warms its own
            resources.enter_context(Hold(lookup.backend, [scorer.release]))
            lookup.warm(scorer.release)
        metrics = ServiceMetrics(scorer.release)
        transform = FeatureTransform(scorer.manifest.features)
        _warm(Ranker(scorer, transform), options)
        ranker = Ranker(scorer, transform, max_candidates=options.max_candidates, observe=metrics.observe_stage)
        executor = ThreadPoolExecutor(options.concurrency or os.cpu_count(), thread_name_prefix="rank")
        resources.callback(executor.shutdown, cancel_futures=True)
        service = Service(ranker, metrics, executor, timeout=options.timeout)
        server.run(
            build_app(service, max_body_bytes=options.max_body_bytes), options.host, options.port,
            on_ready=lambda url: announce(f"torchrank serves {scorer.release} ({scorer.variant}) on {url}"),
            on_stop=service.drain, drain=options.drain,
        )  # fmt: skip


def _open_lookup(options: Options) -> EmbeddingLookup:
    if options.sidecar is not None:
        return SidecarClient(options.sidecar, password=options.sidecar_password)
    assert options.store is not None
    return open_store(options.store, cache_bytes=options.cache_bytes, degrade=options.degrade)


def _open_scorer(options: Options, manifest: Manifest, lookup: EmbeddingLookup) -> Scorer:
    """Says which variant `auto` took, and why; warns of a named one that did not pass its gate."""
    provider, threads, spin = options.provider, options.threads, options.spin
    variant, timing = options.variant, None
    if variant == AUTO:
        timing = time_variants(options.bundle, manifest, provider=provider, threads=threads, spin=spin)
        variant = timing.fastest
    scorer = Scorer(options.bundle, lookup, variant=variant, provider=provider, threads=threads, spin=spin)
    if timing is not None:
        request = "{users} user with {candidates} candidates".format(**TYPICAL)
        logger.info("variant %s is taken, the fastest on this host: %s; medians, %s", variant, timing, request)
    elif not manifest.variant(variant).passed:
        logger.warning("variant %s did not pass its gate when it was exported", variant)
    return scorer


def _warm(ranker: Ranker, options: Options) -> None:
    """Ranks one golden request: kernels are compiled and pages mapped before anybody waits for them."""
    for golden in read_golden(options.bundle):
        ranker.rank(RankRequest(user=golden.user, context=golden.context, candidates=golden.candidates))
        return
