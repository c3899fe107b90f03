"""What a user got wrong: in a feature declaration, in the columns of a file, in the fields of a request."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeatureError(ValueError):
    """`field` is where it went wrong: `candidates[3].price`, `user.age`, a column's name, a key of the declaration."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message, field)  # both, so that the error survives the way back from a worker process
        self.field = field

    def __str__(self) -> str:
        return str(self.args[0])


def accepted(found: str, choices: Iterable[str]) -> str:
    """`; did you mean 'a'? Accepted: a, b` with the nearest choice first, for the end of a message."""
    names = list(choices)
    near = difflib.get_close_matches(found, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} accepted: {', '.join(names) or 'none'}"
