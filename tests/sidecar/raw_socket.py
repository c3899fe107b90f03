"""A connection to a sidecar without a client."""

from __future__ import annotations

import socket
from pathlib import Path


def connect(path: Path) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX)
    raw.settimeout(20)
    raw.connect(str(path))
    return raw


def read_all(raw: socket.socket) -> bytes:
    received = b""
    while chunk := raw.recv(1 << 16):
        received += chunk
    return received
