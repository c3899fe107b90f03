"""A path as users write it (file, folder, glob, fsspec URL) → the files it means, in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa

from torchrank.data.errors import DataError


@dataclass(frozen=True, slots=True)
class Files:
    """`names` are sorted; `file_system` is fsspec's."""

    file_system: Any
    names: tuple[str, ...]

    def open(self, name: str) -> Any:
        """A seekable binary file. Local files are opened by Arrow itself, whose reads need no Python lock."""
        if _is_local(self.file_system):
            return pa.OSFile(name, "rb")
        return self.file_system.open(name, "rb")


def find_files(path: str, suffix: str) -> Files:
    """`path`: a file (any name), a folder (all files below it that end in `suffix`; names beginning with `.` or `_`
    are not data), or a pattern with `*`, `?`, `[`; local, or on any file system that fsspec knows (`s3://…`)."""
    try:
        file_system, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DataError(path, found=str(error), accepted="a local path or an fsspec URL") from error
    accepted = f"a file, a folder with *{suffix} files, or a glob that matches some"
    if any(character in root for character in "*?["):
        names = [name for name in file_system.glob(root) if file_system.isfile(name)]
        found = "no file that matches"
    elif file_system.isdir(root):
        names = [name for name in file_system.find(root) if name.endswith(suffix) and _is_data(name, root)]
        found = f"no *{suffix} file in the folder"
    else:
        names = [root] if file_system.exists(root) else []
        found = "nothing there"
    if not names:
        raise DataError(path, found=found, accepted=accepted)
    return Files(file_system, tuple(sorted(names)))


def _is_data(name: str, root: str) -> bool:
    below = name.removeprefix(root).strip("/").split("/")
    return not any(part.startswith((".", "_")) for part in below)


def _is_local(file_system: Any) -> bool:
    return "file" in (file_system.protocol if isinstance(file_system.protocol, tuple) else (file_system.protocol,))
