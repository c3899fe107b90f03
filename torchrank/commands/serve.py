"""`torchrank serve`: a bundle behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from export.runtime import Provider


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--sidecar",
    metavar="ADDRESS",
    help="Rows from this sidecar: a path, tcp://HOST:PORT or tls://HOST:PORT?ca_file=FILE.",
)
@click.option(
    "--sidecar-password-file", type=click.Path(path_type=Path),
    help="AUTH to the sidecar with its content. Else with TORCHRANK_SIDECAR_PASSWORD's, where that is set.",
)  # fmt: skip
@click.option("--store", metavar="URL", help="Rows from this store, without a sidecar.")
@click.option("--cache-size", default="512MiB", show_default=True, help="With --store: memory for hot rows.")
@click.option(
    "--on-unavailable", metavar="[TABLE=]STEPS", multiple=True,
    help="With --store: what stands in for rows that cannot be fetched, for all tables or one: in this order, "
    "some of cache, previous, default, error.  [default: cache,error]",
)  # fmt: skip
@click.option(
    "--max-default-share", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="With --store: of a request's ids, how many may get default rows that way.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option(
    "--variant", metavar="auto|NAME", default="auto", show_default=True,
    help="Which of the bundle's graphs. auto: the fastest here of those that passed their gate.",
)  # fmt: skip
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True,
    help="What computes the graph. cuda and tensorrt need onnxruntime-gpu.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of one graph run.")
@click.option(
    "--concurrency", type=click.IntRange(1), help="Requests ranked at a time.  [default: as many as there are cores]"
)
@click.option("--spin", is_flag=True, help="Let the graph's threads wait busily: for a host of one's own.")
@click.option("--max-candidates", type=click.IntRange(1), default=5000, show_default=True, help="In one request.")
@click.option("--max-body", default="16MiB", show_default=True, help="Of one request.")
@click.option(
    "--timeout-ms", type=click.IntRange(1), default=1000, show_default=True,
    help="For one request, waiting and look-up included; then 503 or 504.",
)  # fmt: skip
@click.option("--drain-seconds", type=click.IntRange(0), default=30, show_default=True, help="To end after SIGTERM.")
def serve(
    bundle: Path,
    sidecar: str | None,
    sidecar_password_file: Path | None,
    store: str | None,
    cache_size: str,
    on_unavailable: tuple[str, ...],
    max_default_share: float,
    host: str,
    port: int,
    variant: str,
    provider: Provider,
    threads: int,
    concurrency: int | None,
    spin: bool,
    max_candidates: int,
    max_body: str,
    timeout_ms: int,
    drain_seconds: int,
) -> None:
    """Rank candidates over HTTP: POST /rank; GET /health, /ready, /metrics."""
    import logging

    from embedding_store.byte_sizes import parse_size
    from embedding_store.degrade import parse_policy
    from torchrank.commands.sidecar_password import read_password
    from torchrank.serving.launch import Options, launch

    if (sidecar is None) == (store is None):
        raise click.UsageError("give one of --sidecar ADDRESS and --store URL")
    if on_unavailable and store is None:
        raise click.UsageError("--on-unavailable goes with --store; a sidecar has an option of its own for that")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = Options(
        bundle=bundle,
        sidecar=sidecar,
        sidecar_password=read_password("--sidecar-password-file", sidecar_password_file),
        store=store,
        cache_bytes=parse_size(cache_size),
        degrade=parse_policy(on_unavailable, max_default_share),
        host=host,
        port=port,
        variant=variant,
        provider=provider,
        threads=threads,
        concurrency=concurrency,
        spin=spin,
        max_candidates=max_candidates,
        max_body_bytes=parse_size(max_body),
        timeout=timeout_ms / 1e3,
        drain=drain_seconds,
    )
    launch(options, click.echo)
    click.echo("torchrank serve: stopped")
