"""What Hydra's message about a mistyped key leaves out: the keys that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from torchrank.training.config import Config


def unknown_keys(overrides: Iterable[str]) -> list[str]:
    """One line for each override `a.b=value` whose key no configuration has.

    `training.batch_siz=3` gives `training has no key 'batch_siz'; did you mean 'batch_size'? It has: epochs, …`.
    Keys below `model`, `hydra` and other open sets are not judged.
    """
    lines = []
    for override in overrides:
        key, equals, _ = override.lstrip("+~").partition("=")
        if equals and not override.startswith("-") and key.split(".")[0] != "hydra":
            line = _unknown(key.partition("@")[0].split("."))
            if line:
                lines.append(line)
    return lines


def _unknown(parts: list[str]) -> str | None:
    node: object = Config
    for depth, part in enumerate(parts):
        if not (isinstance(node, type) and is_dataclass(node)):
            return None
        names = [field.name for field in fields(node)]
        if part not in names:
            close = difflib.get_close_matches(part, names, n=1)
            guess = f"; did you mean {close[0]!r}?" if close else ";"
            where = ".".join(parts[:depth]) or "the configuration"
            return f"{where} has no key {part!r}{guess} It has: {', '.join(names)}"
        node = get_type_hints(node)[part]
    return None
