"""A run becomes a bundle: tables streamed into pages, the dense graph written, both proven equal to the trainer."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import onnx

import torchrank
from embedding_store.access_counts import count_groups, write_counts
from embedding_store.release import Codec, TableInfo
from export.bundle import Golden, Manifest, PassReport, Variant, sha256, write_manifest
from export.bundle_lookup import BundleLookup
from export.checkpoint_tables import CheckpointTables, load_dense
from export.golden import NeededRows, TrainerScorer, golden_requests, golden_rows
from export.graph import OPSET, dense_graph, write_fp16
from export.hot_ids import count_ids, hottest
from export.optimize import check_pass_names, optimize
from export.parity import check_parity
from export.passes import PASSES, GraphPass
from export.table_pages import write_table
from torchrank.data.loader import Loader
from torchrank.data.source import Source
from torchrank.features.schema import FeatureSchema
from torchrank.features.transform import FeatureTransform
from torchrank.training.config import Config
from torchrank.training.module import build_model, feature_schema
from torchrank.training.run import Run
from torchrank.training.targets import build_target

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "int8": 1e-2}  # of the graph's precision, and of the row codec


@dataclass(frozen=True)
class ExportOptions:
    fp16: bool = False
    without: tuple[str, ...] = ()  # names of graph passes
    passes: tuple[GraphPass, ...] = PASSES
    row_codec: Codec = "fp32"
    model: str | None = None  # the release is MODEL@VERSION
    version: str | None = None
    golden_rows: int = 256
    hot_ids: int = 100_000  # per table
    counted_rows: int = 1_000_000  # of the training data, to find the hot ids


def export_run(
    run: Run, output: Path, options: ExportOptions, tell: Callable[[str], None] = lambda text: None
) -> Manifest:
    """Writes the bundle of the run's best checkpoint to `output`, which appears complete or not at all.

    Raises ValueError (no checkpoint, an unfit one, an output that exists, a pass that there is not), ParityError,
    InvalidRelease (rows that a codec cannot hold).
    """
    check_pass_names(options.without, options.passes)
    if output.exists():
        raise ValueError(f"{output} exists: name another --output, a bundle is never overwritten")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # our own, of an export that was killed
    (partial / "tables").mkdir(parents=True)
    try:
        manifest = _Export(run, partial, options, tell).write()
        partial.rename(output)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return manifest


class _Export:
    def __init__(self, run: Run, folder: Path, options: ExportOptions, tell: Callable[[str], None]) -> None:
        self.run, self.folder, self.options, self.tell = run, folder, options, tell
        self.config: Config = run.config()
        self.checkpoint = run.checkpoint()
        self.spec, self.schema = feature_schema(self.config)
        self.model = build_model(self.config, self.schema)

    def write(self) -> Manifest:
        self.tell(f"checkpoint {self.checkpoint}")
        load_dense(self.checkpoint, self.model)
        rows = golden_rows(
            _source(self.config, "test", "valid", "train"),
            self.spec,
            self.config.data.request_column,
            self.options.golden_rows,
        )
        features = FeatureTransform(self.spec).from_arrow(rows, request_column=self.config.data.request_column)
        trainer = TrainerScorer(self.model, self.schema, features)
        tables = self._write_tables(trainer.needed)
        golden = golden_requests(rows, features, self.spec, trainer.scores())
        encoder = msgspec.json.Encoder()
        (self.folder / "golden.jsonl").write_bytes(b"".join(encoder.encode(request) + b"\n" for request in golden))

        graph, passes = self._optimized()
        onnx.save(graph, self.folder / "model.onnx")
        self.tell("model.onnx written")
        files = {"fp32": "model.onnx"}
        if self.options.fp16:
            files["fp16"] = "model.fp16.onnx"
            write_fp16(self.folder / "model.onnx", self.folder / files["fp16"])
            self.tell("model.fp16.onnx written")
        return self._prove(self._manifest(tables, passes, files, len(features.user_index)), golden)

    def _write_tables(self, needed: dict[str, NeededRows]) -> tuple[TableInfo, ...]:
        saved = CheckpointTables(self.checkpoint)
        _check_tables(self.checkpoint, saved, self.schema)
        counts, requests = count_ids(self._train_loader(), self.schema, self.options.counted_rows)
        tables = []
        for table in self.schema.tables:
            reads, asked = counts[table.name].reads, counts[table.name].asked
            hot = hottest(reads, self.options.hot_ids)
            written = write_table(
                saved, table.name, self.folder / "tables", self.options.row_codec, hot, needed[table.name].take
            )
            tables.append(written)
            write_counts(self.folder / "tables", table.name, count_groups(asked, reads, requests))
            self.tell(f"table {table.name}: {written.rows} rows of dim {table.dim}, {self.options.row_codec}")
        return tuple(tables)

    def _optimized(self) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
        graph, options = dense_graph(self.model, self.schema), self.options
        return optimize(graph, without=options.without, passes=options.passes, tell=self.tell)

    def _manifest(
        self, tables: tuple[TableInfo, ...], passes: tuple[PassReport, ...], files: dict[str, str], golden: int
    ) -> Manifest:
        created = datetime.now(UTC)
        config_hash = hashlib.sha256(self.run.config_bytes()).hexdigest()
        return Manifest(
            torchrank_version=torchrank.__version__,
            model=self.options.model or f"{self.config.data.name}_{type(self.model).__name__.lower()}",
            version=self.options.version or f"{created:%Y%m%d-%H%M%S}-{config_hash[:6]}",
            created=created.isoformat(timespec="seconds"),
            opset=OPSET,
            features=self.spec,
            schema=self.schema,
            tables=tables,
            passes=passes,
            variants=tuple(self._variant(name, file) for name, file in files.items()),
            golden_rows=golden,
            config_sha256=config_hash,
            data_sha256=_data_sha256(_source(self.config, "train")),
        )

    def _variant(self, name: str, file: str) -> Variant:
        path = self.folder / file
        tolerance = max(TOLERANCE[name], TOLERANCE[self.options.row_codec])
        return Variant(
            name=name, file=file, sha256=sha256(path), bytes=path.stat().st_size, max_abs_diff=0.0, tolerance=tolerance
        )

    def _prove(self, manifest: Manifest, golden: Sequence[Golden]) -> Manifest:
        """The manifest with what the gate measured, written."""
        write_manifest(self.folder, manifest)  # the scorer reads a bundle, so there must be one
        measured = []
        with BundleLookup(self.folder, manifest) as lookup:
            for variant in manifest.variants:
                difference = check_parity(self.folder, manifest, variant.name, golden, lookup)
                measured.append(msgspec.structs.replace(variant, max_abs_diff=difference))
                self.tell(f"{variant.name}: differs from the trainer by {difference:.1e} at most")
        proven = msgspec.structs.replace(manifest, variants=tuple(measured))
        write_manifest(self.folder, proven)
        return proven

    def _train_loader(self) -> Loader:
        return Loader(
            _source(self.config, "train"),
            FeatureTransform(self.spec),
            (),
            16_384,
            seed=self.config.seed,
            shuffle=True,
            request_column=self.config.data.request_column,
        )


def _check_tables(checkpoint: Path, saved: CheckpointTables, schema: FeatureSchema) -> None:
    for table in schema.tables:
        found = saved.tables.get(table.name)
        rows = table.rows if found is None or found.ids_key is None else found.rows  # any number of raw ids
        if found is None or (found.rows, found.dim) != (rows, table.dim):
            there = "not there" if found is None else f"{found.rows} x {found.dim} there"
            raise ValueError(
                f"checkpoint {checkpoint} is of another configuration: table {table.name!r} is "
                f"{table.rows} x {table.dim} in the run's features and {there}"
            )


def _source(config: Config, *splits: str) -> Source:
    """The first of the splits that the run's data has."""
    given = {"train": config.data.train, "valid": config.data.valid, "test": config.data.test}
    source: Source = build_target("data", next(found for split in splits if (found := given[split]) is not None))
    return source


def _data_sha256(source: Source) -> str:
    """Of the names and row counts of the training files' parts: tells data sets apart without reading them."""
    digest = hashlib.sha256()
    for piece in source.pieces:
        digest.update(f"{Path(piece.file).name}:{piece.index}:{piece.rows}\n".encode())
    return digest.hexdigest()
