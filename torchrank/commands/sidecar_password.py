"""The password that a sidecar and its clients share: from a file or the environment.

Never an argument: every user of the host can read those.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

VARIABLE = "TORCHRANK_SIDECAR_PASSWORD"


def read_password(option: str, file: Path | None) -> str | None:
    """The content of `file`, which `option` named; without one, the environment's; None where neither is set."""
    text = file.read_text().strip() if file is not None else os.environ.get(VARIABLE)
    if file is not None and not text:
        raise click.UsageError(f"{option} {file} is empty")
    return text or None
