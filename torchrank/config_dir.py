"""Where the YAML files of `conf/` are."""

from __future__ import annotations

from pathlib import Path


def config_dir() -> Path:
    """The absolute path of `conf/`: inside the package where a wheel put it, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    # The inner one first: in site-packages, a `conf` beside the package would be somebody else's.
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
