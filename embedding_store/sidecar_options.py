"""How a sidecar is to be run; `torchrank sidecar --help` says the same in words."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from embedding_store.sidecar_tls import ServerTls

Endpoint = tuple[str, int]  # host, port; port 0 takes a free one

SMALLEST_FRAME = 4 << 10  # bytes that --max-frame may be set to


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarOptions:
    """Raises ValueError where they contradict each other."""

    socket: Path | None = None
    socket_mode: int = 0o660
    listen: Endpoint | None = None
    tls: ServerTls | None = None  # for `listen`
    metrics: Endpoint | None = None
    password: str | None = field(default=None, repr=False)
    threads: int = 8  # look-ups that may wait for a network at the same time
    max_frame: int = 16 << 20  # bytes of one command, and of one reply
    max_connections: int = 512
    idle_seconds: float = 300.0  # after which a connection that says nothing is closed, 0 for never
    drain_seconds: float = 5.0  # after which connections that are still busy are cut
    poll_seconds: float = 2.0  # between two looks for newly activated releases, 0 for never
    max_degraded_share: float = 0.5  # above it the sidecar is not ready

    def __post_init__(self) -> None:
        if self.socket is None and self.listen is None:
            raise ValueError("a sidecar needs a socket path or HOST:PORT to listen on; neither was given")
        if self.max_frame < SMALLEST_FRAME:
            raise ValueError(f"frames of {self.max_frame} bytes hold no look-up; at least {SMALLEST_FRAME} are taken")

    @property
    def guarded(self) -> bool:
        """Whether who reaches the port needs more than that."""
        return self.password is not None or (self.tls is not None and self.tls.context.verify_mode == ssl.CERT_REQUIRED)
