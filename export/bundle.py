"""The bundle: a directory with a manifest, ONNX variants of one dense graph, table pages and golden requests.

manifest.json      this file's `Manifest`
model.onnx, …      one file per variant; model.onnx.data beside one of more than 2 GiB
tables/NAME.pages  encoded rows (layout: embedding_store/release.py); tables/NAME.hot  the most frequent ids;
                   tables/NAME.ids  the raw ids of the rows, where ids are not 0, 1, …;
tables/NAME.counts how unevenly the training data read the rows (embedding_store/access_counts.py)
golden.jsonl       one `Golden` a line: a raw request and the scores the trainer gave it
report.html        the manifest's figures for people; where it was asked for
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from embedding_store.release import TableInfo
from torchrank.features.schema import FeatureSchema
from torchrank.features.spec import FeatureSpec

SCHEMA_VERSION = 2


class InvalidBundle(ValueError):
    """A directory that is not a bundle, or one whose files do not fit its manifest."""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One precision of the dense graph, with what was measured when it was written."""

    name: str  # "fp32", "fp16", "int8"
    file: str
    sha256: str  # of FILE, and FILE.data behind it: the weights of a graph over 2 GiB
    bytes: int  # of the same
    max_abs_diff: float  # largest |score - trainer's score| over the golden rows
    tolerance: float  # the gate on that
    auc_diff: dict[str, float] = {}  # per task that has one: AUC - fp32's on the manifest's validation rows
    auc_gate: float | None = None  # on |auc_diff|; fp32 has none
    passed: bool = True  # False: over a gate, and written because --force was given
    fp32_nodes: tuple[str, ...] = ()  # fp16: those that its range does not hold; int8: the matrix layers not quantized
    latency_ms: float | None = None  # median on the exporting host, one thread, one user with 500 candidates


class Validation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rows that AUCs were measured on."""

    split: str  # of the run's data: "valid"; "test" or "train" where that is all it has
    rows: int
    auc: dict[str, float]  # of the fp32 graph, per task; a task whose labels are all alike has none


class PassReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a graph pass did (export/passes/): each pair is before and after it, of one user with 500 candidates."""

    name: str
    rewrites: int  # 0: it found nothing, or was left out
    nodes: tuple[int, int]
    flops: tuple[int, int]
    latency_ms: tuple[float, float]  # medians on the exporting host, one thread
    max_abs_diff: float  # between the probabilities before and after, on random inputs
    left_out: str | None  # why: switched off, failed, other scores; None: it was run


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    torchrank_version: str
    model: str
    version: str
    created: str  # UTC, ISO 8601
    opset: int
    features: FeatureSpec
    schema: FeatureSchema  # the graph's inputs and their columns; one output per task: probabilities float32 [N]
    tables: tuple[TableInfo, ...]
    passes: tuple[PassReport, ...]  # in the order they ran; every variant is made of the graph behind them
    variants: tuple[Variant, ...]
    variants_left_out: dict[str, str] = {}  # name -> why: over its gate, or nothing to gain
    validation: Validation | None = None  # None: no variant but fp32 was asked for
    golden_rows: int
    config_sha256: str  # of the run's resolved config
    data_sha256: str  # of the names and sizes of the training files

    @property
    def release(self) -> str:
        return f"{self.model}@{self.version}"

    def variant(self, name: str) -> Variant:
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise InvalidBundle(
            f"bundle {self.release} has no variant {name!r}; it has: {', '.join(v.name for v in self.variants)}"
        )


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A raw request as a service client would send it, and the trainer's own scores: task -> [n candidates]."""

    user: dict[str, Any]
    context: dict[str, Any]
    candidates: list[dict[str, Any]]
    scores: dict[str, list[float]]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises InvalidBundle where `folder` is not a bundle that this version reads."""
    path = folder / "manifest.json"
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=dict[str, Any]).get("schema_version")
        if version != SCHEMA_VERSION:
            raise InvalidBundle(f"{path}: schema_version is {version!r}; this torchrank reads {SCHEMA_VERSION}")
        return msgspec.json.decode(content, type=Manifest)
    except OSError as error:
        raise InvalidBundle(f"{folder} is not a bundle: {error.strerror}: {path.name}") from error
    except msgspec.DecodeError as error:
        raise InvalidBundle(f"{path}: {error}") from error


def read_golden(folder: Path) -> Iterator[Golden]:
    decoder = msgspec.json.Decoder(Golden)
    with (folder / "golden.jsonl").open("rb") as lines:
        for line in lines:
            yield decoder.decode(line)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
