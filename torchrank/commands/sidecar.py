"""`torchrank sidecar`: the process beside an inference service that answers its look-ups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchrank.commands.store import store_option

if TYPE_CHECKING:
    from embedding_store.sidecar_tls import ServerTls


_FILE = click.Path(path_type=Path)


@click.command()
@store_option
@click.option("--socket", type=_FILE, help="Listen on this unix socket.")
@click.option("--socket-mode", default="660", show_default=True, help="Rights of the socket's file, octal.")
@click.option("--listen", metavar="HOST:PORT", help="Listen on TCP, also or instead; port 0: any free one.")
@click.option("--tls-cert", type=_FILE, help="TLS on --listen: certificate, PEM, the host's own first.")
@click.option("--tls-key", type=_FILE, help="Its key, PEM, not encrypted.")
@click.option("--tls-ca", type=_FILE, help="Clients have to present a certificate that one of these signed, PEM.")
@click.option(
    "--password-file", type=_FILE,
    help="Clients have to AUTH with its content. Else with TORCHRANK_SIDECAR_PASSWORD's, where that is set.",
)  # fmt: skip
@click.option("--metrics", metavar="HOST:PORT", help="HTTP with /metrics for Prometheus and /ready; port 0: any.")
@click.option("--cache-size", default="512MiB", show_default=True, help="Memory for hot rows.")
@click.option(
    "--on-unavailable", metavar="[TABLE=]STEPS", multiple=True,
    help="What stands in for rows that cannot be fetched, for all tables or one: in this order, some of cache, "
    "previous, default, error.  [default: cache,error]",
)  # fmt: skip
@click.option(
    "--max-default-share", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="Of a look-up's ids, how many may get default rows that way.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=8, show_default=True, help="Fetches at a time.")
@click.option(
    "--poll-seconds", type=click.FloatRange(0), default=2.0, show_default=True,
    help="Between two looks for newly activated releases; 0: never.",
)  # fmt: skip
@click.option(
    "--max-degraded-share", type=click.FloatRange(0, 1), default=0.5, show_default=True,
    help="Of the rows of the last seconds; not ready above it.",
)  # fmt: skip
@click.option("--max-frame", default="16MiB", show_default=True, help="Largest request or reply.")
@click.option("--max-connections", type=click.IntRange(1), default=512, show_default=True, help="At a time.")
@click.option(
    "--idle-timeout", type=click.FloatRange(0), default=300.0, show_default=True,
    help="Seconds after which a connection that says nothing is closed; 0: never.",
)  # fmt: skip
@click.option("--drain-seconds", type=click.FloatRange(0), default=5.0, show_default=True, help="To end after SIGTERM.")
def sidecar(
    store: str,
    socket: Path | None,
    socket_mode: str,
    listen: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    password_file: Path | None,
    metrics: str | None,
    cache_size: str,
    on_unavailable: tuple[str, ...],
    max_default_share: float,
    threads: int,
    poll_seconds: float,
    max_degraded_share: float,
    max_frame: str,
    max_connections: int,
    idle_timeout: float,
    drain_seconds: float,
) -> None:
    """Answer embedding look-ups out of cache and store, to any client of Redis.

    Prints a line that starts with "ready" when it listens. SIGTERM answers what was asked and exits 0.
    """
    import functools
    import logging
    import os

    from embedding_store.byte_sizes import parse_size
    from embedding_store.degrade import parse_policy
    from embedding_store.open import open_store
    from embedding_store.served import ServedStore
    from embedding_store.sidecar import run_sidecar
    from embedding_store.sidecar_options import SidecarOptions
    from embedding_store.sidecar_socket import parse_listen
    from torchrank.commands.sidecar_password import read_password

    if socket is None and listen is None:
        raise click.UsageError("give --socket PATH, --listen HOST:PORT, or both")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = SidecarOptions(
        socket=socket,
        socket_mode=_octal(socket_mode),
        listen=parse_listen(listen) if listen is not None else None,
        tls=_tls(listen, tls_cert, tls_key, tls_ca),
        metrics=parse_listen(metrics) if metrics is not None else None,
        password=read_password("--password-file", password_file),
        threads=threads,
        max_frame=parse_size(max_frame),
        max_connections=max_connections,
        idle_seconds=idle_timeout,
        drain_seconds=drain_seconds,
        poll_seconds=poll_seconds,
        max_degraded_share=max_degraded_share,
    )
    degrade = parse_policy(on_unavailable, max_default_share)
    with ServedStore(open_store(store, cache_bytes=parse_size(cache_size), degrade=degrade)) as served:
        left = run_sidecar(served, options, functools.partial(print, flush=True))
    if left:  # the interpreter would wait for them, as long as the store's time-outs last
        logging.shutdown()
        os._exit(0)


def _tls(listen: str | None, certificate: Path | None, key: Path | None, ca: Path | None) -> ServerTls | None:
    if certificate is None and key is None and ca is None:
        return None
    if listen is None:
        raise click.UsageError("--tls-cert, --tls-key and --tls-ca are for --listen HOST:PORT, which is not given")
    if certificate is None or key is None:
        raise click.UsageError("TLS needs both --tls-cert FILE and --tls-key FILE")
    from embedding_store.sidecar_tls import ServerTls

    return ServerTls(certificate, key, ca)


def _octal(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.UsageError(f"--socket-mode {text}: expected octal rights up to 777, as in 660")
    return mode
