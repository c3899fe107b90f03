"""`torchrank sidecar`: the process beside an inference service that answers its look-ups."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--store", metavar="URL", required=True, help="memmap://DIR, redis://HOST:PORT/DB, redis+unix:///PATH.")
@click.option("--socket", type=click.Path(path_type=Path), help="Listen on this unix socket.")
@click.option("--socket-mode", default="660", show_default=True, help="Rights of the socket's file, octal.")
@click.option("--listen", metavar="HOST:PORT", help="Listen on TCP, also or instead; port 0: any free one.")
@click.option("--cache-size", default="512MiB", show_default=True, help="Memory for hot rows.")
@click.option("--max-frame", default="16MiB", show_default=True, help="Largest request or reply.")
@click.option("--threads", type=click.IntRange(1), default=8, show_default=True, help="Fetches at a time.")
@click.option("--drain-seconds", type=click.FloatRange(0), default=5.0, show_default=True, help="To end after SIGTERM.")
@click.option(
    "--password-file", type=click.Path(path_type=Path),
    help="Clients have to AUTH with its content. Else with TORCHRANK_SIDECAR_PASSWORD's, where that is set.",
)  # fmt: skip
def sidecar(
    store: str,
    socket: Path | None,
    socket_mode: str,
    listen: str | None,
    cache_size: str,
    max_frame: str,
    threads: int,
    drain_seconds: float,
    password_file: Path | None,
) -> None:
    """Answer embedding look-ups out of cache and store, to any client of Redis.

    Prints a line that starts with "ready" when it listens. SIGTERM answers what was asked and exits 0.
    """
    import functools
    import logging

    from embedding_store.byte_sizes import parse_size
    from embedding_store.open import open_store
    from embedding_store.served import ServedStore
    from embedding_store.sidecar import SidecarOptions, run_sidecar
    from embedding_store.sidecar_socket import parse_listen
    from torchrank.commands.sidecar_password import read_password

    if socket is None and listen is None:
        raise click.UsageError("give --socket PATH, --listen HOST:PORT, or both")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = SidecarOptions(
        socket=socket,
        socket_mode=_octal(socket_mode),
        listen=parse_listen(listen) if listen is not None else None,
        max_frame=parse_size(max_frame),
        threads=threads,
        drain_seconds=drain_seconds,
        password=read_password("--password-file", password_file),
    )
    with ServedStore(open_store(store, cache_bytes=parse_size(cache_size))) as served:
        run_sidecar(served, options, functools.partial(print, flush=True))


def _octal(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.UsageError(f"--socket-mode {text}: expected octal rights up to 777, as in 660")
    return mode
