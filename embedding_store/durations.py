"""Durations as people write and read them: 90s, 30m, 24h, 7d."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Seconds, also where no unit stands there. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"duration {text!r}: expected a number and a unit, as in 90s, 30m, 24h or 7d")
    return float(match[1]) * _UNITS[match[2].lower() or "s"]


def format_duration(seconds: float) -> str:
    """In the largest unit of which there are two: 90 s, 45 min, 26 h, 3 d."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
