"""Objects that a configuration names by `_target_`: data sources, the data's generator, the dense optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate


def build_target(key: str, config: Mapping[str, Any], *, partial: bool = False) -> Any:
    """What `config` describes; with `partial`, a function that still takes positional arguments.

    Raises ValueError, which names `key`, for a target that does not exist or does not take these arguments. Any other
    error of the target's own is raised as Hydra shows it.
    """
    try:
        return instantiate({**config, "_partial_": partial, "_convert_": "all"})
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError | ValueError | OSError | ImportError):
            raise ValueError(f"{key}: {cause or error}") from error
        raise
