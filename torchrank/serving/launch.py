"""From options to a service that runs: opens the look-up, loads the bundle, serves, closes everything again."""

from __future__ import annotations

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
from export.bundle import read_golden, read_manifest
from export.session import Scorer
from torchrank.features.transform import FeatureTransform
from torchrank.serving import server
from torchrank.serving.app import Service, build_app
from torchrank.serving.messages import RankRequest
from torchrank.serving.metrics import ServiceMetrics
from torchrank.serving.ranker import Ranker


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
    variant: str
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
        scorer = Scorer(options.bundle, lookup, variant=options.variant, threads=options.threads, spin=options.spin)
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
            on_ready=lambda url: announce(f"torchrank serves {scorer.release} ({options.variant}) on {url}"),
            on_stop=service.drain, drain=options.drain,
        )  # fmt: skip


def _open_lookup(options: Options) -> EmbeddingLookup:
    if options.sidecar is not None:
        return SidecarClient(options.sidecar, password=options.sidecar_password)
    assert options.store is not None
    return open_store(options.store, cache_bytes=options.cache_bytes, degrade=options.degrade)


def _warm(ranker: Ranker, options: Options) -> None:
    """Ranks one golden request: kernels are compiled and pages mapped before anybody waits for them."""
    for golden in read_golden(options.bundle):
        ranker.rank(RankRequest(user=golden.user, context=golden.context, candidates=golden.candidates))
        return
