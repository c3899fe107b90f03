"""A folder that appears when it is complete, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_free(target: Path) -> bool:
    """Nothing is there, or an empty folder."""
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, renamed to it at the end; removed instead when the block raises.

    `target` must be free. Raises OSError where something else came to be there meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp gives 0700
        os.rename(temporary, target)  # also over an empty folder
    except BaseException:
        shutil.rmtree(temporary)
        raise
