"""Sizes as people write them: 512MiB, 1.5GiB, 16k."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SHOWN = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes. KB, MB, … are powers of 1000, KiB, MiB, … of 1024; the B may be left out. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"size {text!r}: expected a number and a unit, as in 512MiB, 1.5GiB or 16777216")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def format_size(size: int) -> str:
    """Three digits and a unit of 1024: 512MiB, 1.25GiB. `parse_size` reads it."""
    number, power = float(size), 0
    while number >= 1000 and power < len(_SHOWN) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.3g}{_SHOWN[power]}"
