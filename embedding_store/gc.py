"""Removes what nobody needs any more from a store: old releases, and publications that were given up.

A release stays as long as it is active, among the last ones that rollback returns to, pinned by a sidecar that serves
it, or younger than the grace time. One that goes is first made invisible, at once, and then erased piece by piece:
nobody finds half a release. Killed at any step, the next run goes on.
"""

from __future__ import annotations

import time
from typing import Literal, Protocol

import msgspec

from embedding_store.backend import Backend, Stored
from embedding_store.durations import format_duration
from embedding_store.errors import ReleaseConflict

KEEP = 1  # releases before the active one
GRACE = 86_400.0  # seconds
_PAUSE = 0.01  # seconds between two batches, for those who read


class Decision(msgspec.Struct, frozen=True):
    release: str
    state: Literal["ready", "unfinished", "removing"]
    removed: bool
    reason: str
    bytes: int


class Erased(Protocol):
    def __call__(self, release: str, pieces: int) -> None:
        """After each batch: how many keys or files of `release` are gone so far."""


def nobody_looks(release: str, pieces: int) -> None:
    pass


def collect(
    backend: Backend, *, keep: int = KEEP, grace: float = GRACE, erased: Erased = nobody_looks
) -> list[Decision]:
    """Removes what `plan` finds. What has come into use since is kept, and its decision says so.

    Nothing is erased before all is taken out: that may take long, and what was decided on would not hold any more.
    """
    decisions, taken_out = [], []
    for stored, decision in plan(backend, keep=keep, grace=grace):
        if decision.removed:
            try:
                if stored.state != "removing":
                    backend.take_out(stored)
            except ReleaseConflict as changed:
                decision = msgspec.structs.replace(decision, removed=False, reason=str(changed))
            else:
                taken_out.append(stored)
        decisions.append(decision)
    for stored in taken_out:
        _erase(backend, stored, erased)
    return decisions


def plan(backend: Backend, *, keep: int = KEEP, grace: float = GRACE) -> list[tuple[Stored, Decision]]:
    """What `collect` would do at this moment. keep: releases per model before the active one; grace: seconds.

    Raises ValueError where one of them is negative.
    """
    if keep < 0 or grace < 0:
        raise ValueError(f"keep is {keep} and grace {grace:g} s; both must be 0 or more")
    reasons = _reasons_to_keep(backend, keep)
    decided = []
    for stored in backend.inventory():
        reason = reasons.get(stored.release) if stored.state == "ready" else None
        reason = reason or _too_young(stored, grace)
        removed = reason is None
        decision = Decision(stored.release, stored.state, removed, reason or _why_removed(stored), stored.bytes)
        decided.append((stored, decision))
    return decided


def _reasons_to_keep(backend: Backend, keep: int) -> dict[str, str]:
    """By release, the strongest one."""
    reasons = {release: f"pinned by {', '.join(owners)}" for release, owners in backend.pins().items()}
    for history in backend.histories().values():
        reasons |= dict.fromkeys(history[:-1][-keep:] if keep else (), "what rollback returns to")
    reasons |= {history[-1]: "active" for history in backend.histories().values() if history}
    return reasons


def _too_young(stored: Stored, grace: float) -> str | None:
    if stored.state == "removing":
        return None
    if stored.publisher:
        return "is being published"
    if stored.idle >= grace:
        return None
    what = "in use or published" if stored.state == "ready" else "worked on"
    return f"{what} {format_duration(stored.idle)} ago, within the grace time of {format_duration(grace)}"


def _why_removed(stored: Stored) -> str:
    if stored.state == "removing":
        return "an interrupted removal"
    return f"{'not in use' if stored.state == 'ready' else 'given up'} for {format_duration(stored.idle)}"


def _erase(backend: Backend, stored: Stored, erased: Erased) -> None:
    pieces = 0
    for count in backend.erase(stored):
        pieces += count
        erased(stored.release, pieces)
        time.sleep(_PAUSE)
