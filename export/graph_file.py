"""A graph's file. One that is too large for a protobuf message has its weights in a second file beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx

LARGEST_MESSAGE = (1 << 31) - (1 << 20)  # protobuf's limit of 2 GiB, less what names and shapes may add


def save_graph(graph: onnx.ModelProto, path: Path, largest: int = LARGEST_MESSAGE) -> None:
    """Writes `path`, and where the graph has more than `largest` bytes also `path`.data (`data_file`).

    ONNX Runtime finds the second file by itself: it is named in the first, relative to it.
    """
    if not is_large(graph, largest):
        onnx.save(graph, path)
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)  # saving moves the weights out of the message it is given
    onnx.save(
        copy, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data_file(path).name,
        size_threshold=1024,
    )  # fmt: skip


def is_large(graph: onnx.ModelProto, largest: int = LARGEST_MESSAGE) -> bool:
    """Counts weights alone: protobuf cannot tell the size of a message that is too large for it."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in graph.graph.initializer) > largest


def data_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def size_and_sha256(path: Path) -> tuple[int, str]:
    """Bytes of the graph's file, or of both, and the hash of what is in them, one after the other."""
    files = [file for file in (path, data_file(path)) if file.exists()]
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return sum(file.stat().st_size for file in files), digest.hexdigest()
