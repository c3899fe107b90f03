"""Sizes as people write them: 512MiB, 1.5GiB, 16k."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes. KB, MB, … are powers of 1000, KiB, MiB, … of 1024; the B may be left out. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"size {text!r}: expected a number and a unit, as in 512MiB, 1.5GiB or 16777216")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])
