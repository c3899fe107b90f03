"""The numba decorator of this package, with a type that mypy can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compiled at the first call, kept on disk for the next process, and run without the interpreter's lock.

    The compiled code is stale when the file of the kernel changes; numba does not see a change in the file of another
    kernel that it calls. Who edits hashing.py removes `torchrank/features/__pycache__`.
    """
    return cast(Callable[P, R], numba.njit(cache=True, nogil=True)(function))
