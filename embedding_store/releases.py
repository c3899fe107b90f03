"""What is in a store, and which release is served: one pointer per model, moved by compare-and-set."""

from __future__ import annotations

import msgspec

from embedding_store.backend import Backend
from embedding_store.errors import UnknownRelease

MAX_HISTORY = 16  # activations that rollback can go back through


class ReleaseState(msgspec.Struct, frozen=True):
    """A row of `torchrank releases`. Of an unfinished release only the name is known."""

    name: str
    state: str  # "ready", or "unfinished": under way, or its publisher died
    active: bool = False
    created: str = ""  # UTC, ISO 8601
    tables: int = 0
    rows: int = 0
    bytes: int = 0


def list_releases(backend: Backend) -> list[ReleaseState]:
    """Complete releases by name, then unfinished ones."""
    active = {history[-1] for history in backend.histories().values() if history}
    ready = [
        ReleaseState(
            name,
            "ready",
            name in active,
            manifest.created,
            len(manifest.tables),
            sum(table.rows for table in manifest.tables),
            sum(table.bytes for table in manifest.tables),
        )
        for name, manifest in sorted(backend.releases().items())
    ]
    return ready + [ReleaseState(unfinished.release, "unfinished") for unfinished in backend.unfinished()]


def activate(backend: Backend, release: str) -> str | None:
    """Makes `release` the active one of its model; returns the one that was, which may be the same.

    Raises UnknownRelease, and ReleaseConflict where somebody else moved the pointer at the same moment.
    """
    model = backend.manifest(release).model  # raises where it is not complete
    history = backend.history(model)
    if history and history[-1] == release:
        return release
    backend.set_history(model, history, (*history, release)[-MAX_HISTORY:])
    return history[-1] if history else None


def rollback(backend: Backend, model: str) -> tuple[str, str]:
    """Returns to the release that was active before; gives (the one left, the one that is active now).

    Raises UnknownRelease where there is none before, ReleaseConflict as `activate`.
    """
    history = backend.history(model)
    if not history:
        models = ", ".join(backend.histories()) or "none"
        raise UnknownRelease(f"no release of model {model!r} was ever active in {backend.address}; models: {models}")
    if len(history) == 1:
        raise UnknownRelease(f"{history[0]} is the first active release of {model}: there is none to return to")
    backend.manifest(history[-2])  # raises where it is gone
    backend.set_history(model, history, history[:-1])
    return history[-1], history[-2]
