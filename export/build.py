"""A run becomes a bundle: tables streamed into pages, the dense graph written, both proven equal to the trainer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import onnx

import torchrank
from embedding_store.access_counts import count_groups, write_counts
from embedding_store.release import Codec, TableInfo
from export.bundle import Golden, InvalidBundle, Manifest, PassReport, Validation, Variant, write_manifest
from export.bundle_lookup import BundleLookup
from export.checkpoint_tables import CheckpointTables, load_dense
from export.golden import NeededRows, TrainerScorer, golden_requests, golden_rows
from export.graph import OPSET, dense_graph
from export.graph_file import LARGEST_MESSAGE, data_file, is_large, save_graph, size_and_sha256
from export.hot_ids import count_ids, hottest
from export.optimize import check_pass_names, optimize
from export.output_folder import bundle_folder
from export.parity import check_parity, golden_difference
from export.passes import PASSES, GraphPass
from export.precisions import AUC_GATE, Made, NoVariant, VariantMaker
from export.report import write_report
from export.runtime import RUN_ERRORS, open_session
from export.table_pages import write_table
from export.validation import assembler_of, golden_feeds, validation_rows
from export.variants import RunFailed, medians_ms
from torchrank.data.loader import Loader
from torchrank.data.source import Source
from torchrank.features.schema import FeatureSchema
from torchrank.features.transform import FeatureTransform
from torchrank.training.config import Config
from torchrank.training.module import build_model, feature_schema
from torchrank.training.run import Run
from torchrank.training.targets import build_target

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "int8": 1e-2}  # of the graph's precision, and of the row codec
_UNFIT_FILE = (InvalidBundle, onnx.checker.ValidationError, *RUN_ERRORS)


@dataclass(frozen=True)
class ExportOptions:
    fp16: bool = False
    int8: bool = False
    force: bool = False  # writes variants that are over a gate, too, and replaces a bundle
    report: bool = False  # writes report.html
    without: tuple[str, ...] = ()  # names of graph passes
    passes: tuple[GraphPass, ...] = PASSES
    row_codec: Codec = "fp32"
    model: str | None = None  # the release is MODEL@VERSION
    version: str | None = None
    golden_rows: int = 256
    hot_ids: int = 100_000  # per table
    counted_rows: int = 1_000_000  # of the training data, to find the hot ids
    validation_rows: int = 50_000  # that variants are measured on
    largest_message: int = LARGEST_MESSAGE  # bytes of a graph in one file
    largest_optimized: int = 200_000_000  # bytes of weights: passes keep every graph that they try, and its session


def export_run(
    run: Run, output: Path, options: ExportOptions, tell: Callable[[str], None] = lambda text: None
) -> Manifest:
    """Writes the bundle of the run's best checkpoint to `output`, which appears complete or not at all.

    Raises ValueError (no checkpoint, an unfit one, an output that exists, a pass that there is not), ParityError,
    InvalidRelease (rows that a codec cannot hold), OSError (the disk is full).
    """
    check_pass_names(options.without, options.passes)
    with bundle_folder(output, force=options.force) as folder:
        (folder / "tables").mkdir()
        return _Export(run, folder, options, tell).write()


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
        manifest = self._manifest(tables, passes, self._write_graph("fp32", graph), len(features.user_index))
        write_manifest(self.folder, manifest)  # the scorer reads a bundle, so there must be one
        with BundleLookup(self.folder, manifest) as lookup:
            manifest = self._proven(manifest, golden, lookup)
            manifest = self._with_variants(manifest, graph, golden, lookup)
            manifest = self._timed(manifest)
            write_manifest(self.folder, manifest)
            if self.options.report:
                write_report(self.folder, manifest, golden, lookup)
        return manifest

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
        # ONNX Runtime takes a message that is too large only from files; passes and variants try many graphs in memory.
        for most, consequence in (
            (options.largest_message, "no passes, no variants"),
            (options.largest_optimized, "no passes, which would take about 18 times as much memory"),
        ):
            if is_large(graph, most):
                self.tell(f"the graph's weights have more than {most:,} bytes: {consequence}")
                return graph, ()
        return optimize(graph, without=options.without, passes=options.passes, tell=self.tell)

    def _write_graph(self, name: str, graph: onnx.ModelProto) -> Variant:
        path = self._graph_path(name)
        save_graph(graph, path, self.options.largest_message)
        onnx.checker.check_model(path, full_check=True)
        size, digest = size_and_sha256(path)
        self.tell(f"{path.name} written")
        return Variant(
            name=name, file=path.name, sha256=digest, bytes=size, max_abs_diff=0.0, tolerance=self._tolerance(name)
        )

    def _graph_path(self, name: str) -> Path:
        return self.folder / ("model.onnx" if name == "fp32" else f"model.{name}.onnx")

    def _tolerance(self, name: str) -> float:
        return max(TOLERANCE[name], TOLERANCE[self.options.row_codec])

    def _manifest(
        self, tables: tuple[TableInfo, ...], passes: tuple[PassReport, ...], fp32: Variant, golden: int
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
            variants=(fp32,),
            golden_rows=golden,
            config_sha256=config_hash,
            data_sha256=_data_sha256(_source(self.config, "train")),
        )

    def _proven(self, manifest: Manifest, golden: Sequence[Golden], lookup: BundleLookup) -> Manifest:
        """The fp32 graph is what the trainer trained, or there is no bundle."""
        difference = check_parity(self.folder, manifest, "fp32", golden, lookup)
        self.tell(f"fp32: differs from the trainer by {difference:.1e} at most")
        return _with(manifest, msgspec.structs.replace(manifest.variants[0], max_abs_diff=difference))

    def _with_variants(
        self, manifest: Manifest, graph: onnx.ModelProto, golden: Sequence[Golden], lookup: BundleLookup
    ) -> Manifest:
        names = [name for name in ("fp16", "int8") if getattr(self.options, name)]
        if not names:
            return manifest
        if is_large(graph, self.options.largest_message):
            return msgspec.structs.replace(manifest, variants_left_out=dict.fromkeys(names, "the graph is too large"))
        split = _first_split(self.config, "valid", "test", "train")
        assembler = assembler_of(graph, manifest)
        rows = validation_rows(
            _source(self.config, split), manifest, lookup, assembler,
            self.config.data.request_column, self.options.validation_rows,
        )  # fmt: skip
        golden_rows = golden_feeds(golden, manifest, lookup, assembler)
        maker = VariantMaker(graph, rows, golden_rows, self._tolerance, self.tell)
        manifest = msgspec.structs.replace(manifest, validation=Validation(split, rows.count, maker.auc))
        for name in names:
            manifest = self._judged(manifest, name, maker, golden, lookup)
        return manifest

    def _judged(
        self, manifest: Manifest, name: str, maker: VariantMaker, golden: Sequence[Golden], lookup: BundleLookup
    ) -> Manifest:
        """The manifest with that variant, whose file is written, or with the reason why there is none."""
        try:
            made = maker.make(name)
            if made.misfit is not None and not self.options.force:
                raise NoVariant(made.misfit)
            variant = self._compared(manifest, self._measured(made), golden, lookup)
        except NoVariant as error:
            return self._without(manifest, name, str(error))
        except _UNFIT_FILE as error:
            return self._without(manifest, name, f"its file does not run: {str(error).strip()}")
        if made.misfit is not None:
            self.tell(f"{name} is written in spite of its gate (--force): {made.misfit}")
        self.tell(f"{name}: differs from the trainer by {variant.max_abs_diff:.1e} at most, {_signed(made.auc_diff)}")
        return _with(manifest, variant)

    def _compared(
        self, manifest: Manifest, variant: Variant, golden: Sequence[Golden], lookup: BundleLookup
    ) -> Variant:
        """From its file, as a service reads it. Raises NoVariant where that gives not what the graph in memory gave."""
        manifest = _with(manifest, variant)
        write_manifest(self.folder, manifest)
        difference = golden_difference(self.folder, manifest, variant.name, golden, lookup)
        if not math.isfinite(difference) or (variant.passed and difference > variant.tolerance):
            gate = f"the gate is {variant.tolerance:g}"
            raise NoVariant(f"a golden score of its file differs from the trainer's by {difference:.1e}; {gate}")
        return msgspec.structs.replace(variant, max_abs_diff=difference)

    def _without(self, manifest: Manifest, name: str, reason: str) -> Manifest:
        """The manifest less that variant, whose file goes."""
        self.tell(f"{name} is left out: {reason}")
        for file in (self._graph_path(name), data_file(self._graph_path(name))):
            file.unlink(missing_ok=True)
        return msgspec.structs.replace(
            manifest,
            variants=tuple(variant for variant in manifest.variants if variant.name != name),
            variants_left_out={**manifest.variants_left_out, name: reason},
        )

    def _measured(self, made: Made) -> Variant:
        return msgspec.structs.replace(
            self._write_graph(made.name, made.graph),
            auc_diff=made.auc_diff,
            auc_gate=AUC_GATE[made.name],
            passed=made.misfit is None,
            fp32_nodes=made.fp32_nodes,
        )

    def _timed(self, manifest: Manifest) -> Manifest:
        """With each variant's latency; less those that fail at a request of that size. Raises RunFailed of fp32."""
        try:
            taken = medians_ms({each.name: open_session(self.folder / each.file) for each in manifest.variants})
        except RunFailed as failure:
            if failure.name == "fp32":
                raise
            return self._timed(self._without(manifest, failure.name, str(failure)))
        for variant in manifest.variants:
            manifest = _with(manifest, msgspec.structs.replace(variant, latency_ms=taken[variant.name]))
        return manifest

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
    unknown = sorted(saved.tables.keys() - {table.name for table in schema.tables})
    if unknown:
        raise ValueError(
            f"checkpoint {checkpoint} is of another configuration: it has table {unknown[0]!r}, and the run's features "
            f"have not"
        )


def _with(manifest: Manifest, variant: Variant) -> Manifest:
    """The manifest with that variant, in place of the one of its name."""
    variants = {each.name: each for each in manifest.variants} | {variant.name: variant}
    return msgspec.structs.replace(manifest, variants=tuple(variants.values()))


def _signed(auc_diff: dict[str, float]) -> str:
    return "AUC " + ", ".join(f"{task} {value:+.1e}" for task, value in auc_diff.items()) if auc_diff else "no AUC"


def _first_split(config: Config, *splits: str) -> str:
    """The first of the splits that the run's data has."""
    return next(split for split in splits if getattr(config.data, split) is not None)


def _source(config: Config, *splits: str) -> Source:
    """The first of the splits that the run's data has."""
    source: Source = build_target("data", getattr(config.data, _first_split(config, *splits)))
    return source


def _data_sha256(source: Source) -> str:
    """Of the names and row counts of the training files' parts: tells data sets apart without reading them."""
    digest = hashlib.sha256()
    for piece in source.pieces:
        digest.update(f"{Path(piece.file).name}:{piece.index}:{piece.rows}\n".encode())
    return digest.hexdigest()
