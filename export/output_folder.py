"""A bundle's folder: it appears by one rename, complete, or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from embedding_store.file_locks import locked_if_free

_OF_A_TABLE = ("pages", "ids", "hot", "counts")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, *, force: bool) -> None:
    """Raises ValueError where something is there; with `force`, where that is anything but a bundle's files."""
    if not output.exists() and not output.is_symlink():
        return
    reason = _no_bundle(output)
    if reason:
        also = "--force replaces a bundle and nothing else" if force else "name another --output"
        raise ValueError(f"{output} exists and {reason}: {also}")
    if not force:
        raise ValueError(f"{output} exists: name another --output, or replace the bundle there with --force")


@contextmanager
def bundle_folder(output: Path, *, force: bool = False) -> Iterator[Path]:
    """An empty folder that becomes `output` where the block ends without an error, and else goes.

    With `force` a bundle that is there is replaced; until the new one is complete it stays as it is. Raises ValueError
    (`check_output`, or another process is writing there), and OSError naming `output` where the disk is full.
    """
    output = _full(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked_if_free(output.with_name(f".{output.name}.lock")) as free:
        if not free:
            raise ValueError(f"another export is writing {output}")
        with _partial_folder(output, force) as partial:
            yield partial


@contextmanager
def _partial_folder(output: Path, force: bool) -> Iterator[Path]:
    """By the holder of the lock."""
    replaced = output.with_name(f".{output.name}.replaced")
    if replaced.exists() and not output.exists():
        replaced.rename(output)  # an export was killed between the two renames
    check_output(output, force=force)
    for ours in _of_killed_exports(output):
        shutil.rmtree(ours)
    # Not by `mkdtemp`: others may read a bundle.
    partial = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        if output.exists():
            _replace(partial, output, replaced)
        else:
            partial.rename(output)
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(error.errno, f"{os.strerror(error.errno)}; nothing is written", str(output)) from error
        raise
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _full(output: Path) -> Path:
    """With a name and a parent, also of `.` and `..`. A link stays one, to be refused."""
    return output.resolve() if output.name in ("", "..") else output.parent.resolve() / output.name


def _of_killed_exports(output: Path) -> list[Path]:
    ours = re.compile(rf"\.{re.escape(output.name)}\.(partial-[0-9a-f]{{8}}|replaced)")
    return [path for path in output.parent.iterdir() if ours.fullmatch(path.name)]


def _replace(partial: Path, output: Path, replaced: Path) -> None:
    check_output(output, force=True)  # again: the export took its time
    output.rename(replaced)
    try:
        partial.rename(output)
    except OSError:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced)


def _no_bundle(folder: Path) -> str:
    """Why `folder` is not a bundle of any schema version, with nothing in it that is somebody else's; "" if it is."""
    if folder.is_symlink() or not folder.is_dir():
        return "is not a folder"
    try:
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return "has no manifest of a bundle"
    if not {"schema_version", "model", "version", "tables", "variants"} <= manifest.keys():
        return "has a manifest that is not a bundle's"
    try:
        ours = _written(manifest)
    except (TypeError, KeyError):
        return "has a manifest that is not a bundle's"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or (name not in ours if path.is_file() else name != "tables"):
            return f"holds {name!r}, which is not a bundle's"
    return ""


def _written(manifest: dict[str, Any]) -> set[str]:
    """The files that an export may have written beside that manifest."""
    graphs = {variant["file"] for variant in manifest["variants"]}
    tables = {f"tables/{table['name']}.{kind}" for table in manifest["tables"] for kind in _OF_A_TABLE}
    return {"manifest.json", "golden.jsonl", "report.html", *graphs, *(f"{file}.data" for file in graphs), *tables}
