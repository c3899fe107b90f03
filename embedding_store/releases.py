"""What is in a store, and which release is served: one pointer per model, moved by compare-and-set."""

from __future__ import annotations

from typing import Literal

import msgspec

from embedding_store.backend import Backend, History
from embedding_store.errors import UnknownRelease

MAX_HISTORY = 16  # activations that rollback can go back through


class ReleaseState(msgspec.Struct, frozen=True):
    """A row of `torchrank releases`. Of an unfinished release maybe only the name is known."""

    name: str
    state: Literal["ready", "unfinished", "removing"]
    active: bool = False
    created: str = ""  # of the bundle, UTC, ISO 8601
    tables: int = 0
    rows: int = 0
    bytes: int = 0
    idle_seconds: float = 0  # `backend.Stored.idle`
    publisher: bool = False  # one is at work on it
    pinned_by: tuple[str, ...] = ()  # owners of pins: sidecars that serve it


def list_releases(backend: Backend) -> list[ReleaseState]:
    """Complete releases by name, then unfinished ones, then those half removed."""
    active = {history[-1] for history in backend.histories().values() if history}
    pins = backend.pins()
    found = []
    for stored in backend.inventory():
        tables = stored.manifest.tables if stored.manifest else ()
        ready = stored.state == "ready"
        found.append(
            ReleaseState(
                stored.release,
                stored.state,
                ready and stored.release in active,
                stored.manifest.created if stored.manifest else "",
                len(tables),
                sum(table.rows for table in tables),
                stored.bytes,
                round(stored.idle, 1),
                stored.publisher,
                tuple(pins.get(stored.release, ())) if ready else (),
            )
        )
    return found


def activate(backend: Backend, release: str, expected: History | None = None) -> str | None:
    """Makes `release` the active one of its model; returns the one that was, which may be the same.

    expected: the history that the caller has seen; None: the one of this moment. Raises UnknownRelease, and
    ReleaseConflict where somebody else has moved the pointer since.
    """
    model = backend.manifest(release).model  # raises where it is not complete
    history = backend.history(model) if expected is None else expected
    there = history[-1:] == (release,)
    backend.set_history(model, history, history if there else (*history, release)[-MAX_HISTORY:])
    return history[-1] if history else None


def rollback(backend: Backend, model: str) -> tuple[str, str]:
    """Returns to the release that was active before; gives (the one left, the one that is active now).

    Raises UnknownRelease where there is none before, or where gc has removed it; ReleaseConflict as `activate`.
    """
    history = backend.history(model)
    if not history:
        models = ", ".join(backend.histories()) or "none"
        raise UnknownRelease(f"no release of model {model!r} was ever active in {backend.address}; models: {models}")
    if len(history) == 1:
        raise UnknownRelease(f"{history[0]} is the first active release of {model}: there is none to return to")
    left, before = history[-1], history[-2]
    try:
        backend.set_history(model, history, history[:-1])
    except UnknownRelease as error:
        raise UnknownRelease(
            f"{before}, which was active before {left}, is no longer in {backend.address}: gc has removed it; publish "
            f"it again, or activate another release"
        ) from error
    return left, before
