"""Locks on files that end with the process that holds them, also by kill -9."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock of `path`, which is made where it is not there. Who may read it may lock it: several users may
    share a directory."""
    handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Whether nobody had the lock of `path`, which then is held in the block. Waits for nobody.

    The file goes with its lock. Who opened it before that has the lock of a file without a name, and tries again.
    """
    handle = _free_file(path)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(PermissionError):  # another user's in a sticky directory: it may as well stay
            path.unlink()
        os.close(handle)


def _free_file(path: Path) -> int | None:
    """Open and locked, and still there; None where somebody else has it."""
    while True:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        os.close(handle)  # whose holder has just ended


def is_locked(path: Path) -> bool:
    """By somebody, at this moment."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def owns_folder(handle: int, folder: Path) -> bool:
    """Takes the lock of a folder that is open as `handle`, and looks that no rename came before it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):
        return False
