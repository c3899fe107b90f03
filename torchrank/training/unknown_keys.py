"""What Hydra's message about a mistyped key leaves out: the keys that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from omegaconf import OmegaConf

from torchrank.config_dir import config_dir
from torchrank.training.config import Config


def unknown_keys(overrides: Iterable[str]) -> list[str]:
    """One line for each override `a.b=value` whose key no configuration has.

    `training.batch_siz=3` gives `training has no key 'batch_siz'; did you mean 'batch_size'? It has: epochs, …`.
    Keys of the model are those of its YAML, where that is one of torchrank's; `hydra` and open sets are not judged.
    """
    overrides = list(overrides)
    model = _model_keys(overrides)
    lines = []
    for override in overrides:
        key, equals, _ = override.lstrip("+~").partition("=")
        parts = key.partition("@")[0].split(".")
        if not equals or override.startswith("-") or parts[0] == "hydra":
            continue
        if parts[0] == "model" and len(parts) == 2 and model and override.startswith("model"):
            line = None if parts[1] in model else _line("model", parts[1], model)
        else:
            line = _unknown(parts)
        if line:
            lines.append(line)
    return lines


def _model_keys(overrides: Iterable[str]) -> list[str]:
    for override in overrides:
        name = override.removeprefix("+model=")
        path = config_dir() / "model" / f"{name}.yaml"
        if name != override and path.is_file():
            return [str(key) for key in OmegaConf.load(path)]
    return []


def _unknown(parts: list[str]) -> str | None:
    node: object = Config
    for depth, part in enumerate(parts):
        if not (isinstance(node, type) and is_dataclass(node)):
            return None
        names = [field.name for field in fields(node)]
        if part not in names:
            return _line(".".join(parts[:depth]) or "the configuration", part, names)
        node = get_type_hints(node)[part]
    return None


def _line(where: str, key: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    return f"{where} has no key {key!r}{guess} It has: {', '.join(names)}"
