"""What publishing and mending say about how far they are."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def __call__(self, step: str, done: int, total: int) -> None:
        """`step` says what is going on; done and total are bytes of all tables, each
        time that one is written or read back."""


def no_progress(step: str, done: int, total: int) -> None:
    pass
