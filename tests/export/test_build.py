"""A trained run becomes a bundle: what is in it, that every way of serving it gives the trainer's scores, and that
nothing appears where something is wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from embedding_store.codec import decode
from embedding_store.errors import InvalidRelease, StoreUnavailable
from embedding_store.lookup import EmbeddingLookup
from embedding_store.open import open_backend, open_store
from embedding_store.publish import publish
from embedding_store.row_checks import table_seed, with_checks
from export.build import ExportOptions, export_run
from export.bundle import Manifest, read_golden, read_manifest, sha256
from export.bundle_lookup import BundleLookup
from export.checkpoint_tables import CheckpointTables
from export.parity import ParityError, check_parity
from export.session import Scorer
from tests.redis_server import RedisServer
from tests.tiny import CONF, compose_tiny, copy_run, train_on_ranks
from torchrank.features.transform import FeatureTransform
from torchrank.predict import predict
from torchrank.train import train
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run

TOLERANCE = {
    ("fp32", "fp32"): 1e-5, ("fp16", "fp32"): 2e-3, ("fp32", "fp16"): 2e-3, ("fp16", "fp16"): 2e-3,
    ("fp32", "int8"): 1e-2, ("fp16", "int8"): 1e-2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


@dataclass
class Exported:
    run: Path
    bundle: Path
    manifest: Manifest


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def exported(request: pytest.FixtureRequest, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Both variants of the graph, rows in the codec of the parameter."""
    folder = tmp_path_factory.mktemp("bundles") / request.param
    # force: with 1,500 validation rows, a pair in ten thousand that changes places is fp16's whole gate
    return export(tiny_run, folder, row_codec=request.param, fp16=True, force=True)


@pytest.fixture(scope="module")
def bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tiny_run, tmp_path_factory.mktemp("bundles") / "plain")


def export(run: Path, output: Path, **options: object) -> Exported:
    quiet_libraries()  # module fixtures are made before the one above
    return Exported(run, output, export_run(Run(run), output, ExportOptions(**options)))  # type: ignore[arg-type]


def whole_tables(run: Path, tmp_path: Path) -> dict[str, NDArray[np.float32]]:
    """Every table of the run's checkpoint, read by torch alone."""
    tables: dict[str, NDArray[np.float32]] = {}

    def collect(state: dict[str, torch.Tensor]) -> None:
        for key, value in state.items():
            if key.startswith("model.embeddings."):
                tables[key.split(".")[-2].removeprefix("table/").replace("/", ".")] = value.numpy()

    copy_run(run, tmp_path / "read", collect)
    return tables


def test_manifest_says_what_is_in_the_files(exported: Exported, tiny_run: Path) -> None:
    manifest, folder = read_manifest(exported.bundle), exported.bundle
    assert manifest == exported.manifest
    assert manifest.model == "tiny_mmoe"
    assert manifest.release == f"tiny_mmoe@{manifest.version}"
    assert abs((datetime.now(UTC) - datetime.fromisoformat(manifest.created)).total_seconds()) < 3600
    assert manifest.opset == onnx.load(folder / "model.onnx").opset_import[0].version
    assert manifest.config_sha256 == hashlib.sha256((tiny_run / "config.yaml").read_bytes()).hexdigest()
    assert manifest.schema.tasks == ("click", "finish")
    assert manifest.golden_rows == 256
    codec = manifest.tables[0].codec
    for variant in manifest.variants:
        assert (variant.sha256, variant.bytes) == (
            sha256(folder / variant.file),
            (folder / variant.file).stat().st_size,
        )
        assert variant.tolerance == TOLERANCE[variant.name, codec]
        assert 0 <= variant.max_abs_diff <= variant.tolerance
    assert [variant.name for variant in manifest.variants] == ["fp32", "fp16"]
    assert manifest.variants[1].bytes < 0.7 * manifest.variants[0].bytes
    for table in manifest.tables:
        pages = folder / "tables" / f"{table.name}.pages"
        assert (table.sha256, table.bytes) == (sha256(pages), pages.stat().st_size)
    expected = {"manifest.json", "model.onnx", "model.fp16.onnx", "golden.jsonl", "tables"}
    assert {path.name for path in folder.iterdir()} == expected
    assert not list(folder.parent.glob(".*"))  # no partial folder


def test_pages_are_the_tables_of_the_checkpoint(exported: Exported, tmp_path: Path) -> None:
    tables = whole_tables(exported.run, tmp_path)
    assert tables.keys() == {table.name for table in exported.manifest.tables}
    for table in exported.manifest.tables:
        pages = np.fromfile(exported.bundle / "tables" / f"{table.name}.pages", np.uint8)
        rows = decode(table.codec, pages.reshape(table.rows, table.stored_bytes)[:, : table.row_bytes])
        wanted = tables[table.name]
        spread = np.ptp(wanted, axis=1, keepdims=True)
        allowed = {"fp32": 0, "fp16": np.abs(wanted) * 2.0**-11 + 2.0**-25, "int8": spread / 500 + 2.0**-20}
        assert (np.abs(rows - wanted) <= allowed[table.codec]).all()


def test_hot_ids_are_the_ones_the_training_data_reads_most(bundle: Exported, tiny_data: Path) -> None:
    rows = pq.read_table(tiny_data / "train.parquet").combine_chunks().to_batches()[0]
    features = FeatureTransform(bundle.manifest.features).from_arrow(rows, request_column="request_id")
    read = {name: ids.values for side in (features.user, features.item) for name, ids in side.sparse.items()}
    tables = {table.name: table for table in bundle.manifest.schema.tables}
    for table in bundle.manifest.tables:
        values = np.concatenate([read[feature] for feature in tables[table.name].features])
        ids, counts = np.unique(values, return_counts=True)
        hot = np.fromfile(bundle.bundle / "tables" / f"{table.name}.hot", "<i8")
        assert sorted(hot) == sorted(ids)
        count = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        # Batches cut a few requests in two, whose user features then count twice.
        found = np.array([count[id] for id in hot.tolist()])
        assert (np.diff(found) <= 0.02 * len(values) / len(ids) + 3).all()
        assert count[int(hot[0])] >= 0.9 * counts.max()


@contextmanager
def lookup_of(kind: str, bundle: Exported, folder: Path, redis: RedisServer) -> Iterator[EmbeddingLookup]:
    if kind == "bundle":
        with BundleLookup(bundle.bundle, bundle.manifest) as lookup:
            yield lookup
        return
    url = redis.url if kind == "redis" else f"memmap://{folder}"
    with open_backend(url) as backend:
        publish(bundle.bundle, backend)
    with open_store(url, cache_bytes=20_000) as store:  # less than the tables: rows come from both
        yield store


def golden_scores(bundle: Exported) -> dict[str, NDArray[np.float64]]:
    golden = list(read_golden(bundle.bundle))
    return {task: np.concatenate([g.scores[task] for g in golden]) for task in bundle.manifest.schema.tasks}


@pytest.mark.parametrize("kind", ["bundle", "memmap", "redis"])
def test_every_store_gives_the_trainers_scores(
    exported: Exported, kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    expected = golden_scores(exported)
    transform = FeatureTransform(exported.manifest.features)
    with lookup_of(kind, exported, tmp_path / "store", redis_server) as lookup:
        for variant in exported.manifest.variants:
            scorer = Scorer(exported.bundle, lookup, variant=variant.name)
            found: dict[str, list[NDArray[np.float32]]] = {task: [] for task in expected}
            for golden in read_golden(exported.bundle):
                scores = scorer.score(transform.from_request(golden.user, golden.context, golden.candidates))
                assert (scores.release, scores.absent) == (exported.manifest.release, 0)
                for task, values in scores.tasks.items():
                    assert values.dtype == np.float32
                    found[task].append(values)
            worst = max(np.abs(np.concatenate(found[task]) - expected[task]).max() for task in expected)
            assert worst <= variant.tolerance
            assert worst == pytest.approx(variant.max_abs_diff, abs=1e-7)  # the manifest says what a store gives


def test_golden_scores_are_what_predict_writes(bundle: Exported, tiny_data: Path, tmp_path: Path) -> None:
    """Golden scores come from a small table beside the page writer, predict's from the sharded module."""
    output = tmp_path / "scores.parquet"
    predict(bundle.run, str(tiny_data / "valid.parquet"), output, keep=["item_id", "price"])
    predicted = pq.read_table(output).slice(0, 256)
    candidates = [c for golden in read_golden(bundle.bundle) for c in golden.candidates]
    assert [c["item_id"] for c in candidates] == predicted["item_id"].to_pylist()
    for task, scores in golden_scores(bundle).items():
        np.testing.assert_allclose(scores, predicted[f"score_{task}"].to_numpy(), atol=1e-6, rtol=0)
        assert scores.std() > 0.02  # a model that has learnt something


@pytest.fixture
def damaged(bundle: Exported, tmp_path: Path) -> Exported:
    return Exported(bundle.run, Path(shutil.copytree(bundle.bundle, tmp_path / "damaged")), bundle.manifest)


def check(bundle: Exported) -> float:
    with BundleLookup(bundle.bundle, bundle.manifest) as lookup:
        return check_parity(bundle.bundle, bundle.manifest, "fp32", list(read_golden(bundle.bundle)), lookup)


def test_the_gate_sees_one_changed_row(damaged: Exported) -> None:
    assert check(damaged) == damaged.manifest.variant("fp32").max_abs_diff
    golden = next(read_golden(damaged.bundle))
    request = FeatureTransform(damaged.manifest.features).from_request(golden.user, golden.context, golden.candidates)
    table = next(table for table in damaged.manifest.tables if table.name == "item_id")
    path = damaged.bundle / "tables" / "item_id.pages"
    pages = np.memmap(path, np.uint8, "r+", shape=(table.rows, table.stored_bytes))
    key = request.item.sparse["item_id"].values[:1]
    row = np.ascontiguousarray(pages[key, : table.row_bytes]).view("<f4") + np.float32(0.5)
    pages[key, : table.row_bytes] = row.view(np.uint8)
    with pytest.raises(StoreUnavailable, match=rf"item_id.pages has other bytes .* at id {key[0]} .*: damaged"):
        check(damaged)
    pages[key] = with_checks(table_seed(table), key, row.view(np.uint8))  # as if it had been exported so
    with pytest.raises(
        ParityError, match=r"variant fp32: \d+ of 512 golden scores differ .* by more than 1e-05"
    ) as error:
        check(damaged)
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert all("golden request" in line and "trainer 0." in line and "bundle 0." in line for line in lines[1:])
    differences = [abs(float(line.split()[-3].rstrip(",")) - float(line.split()[-1])) for line in lines[1:]]
    assert differences == sorted(differences, reverse=True)


def test_the_gate_sees_one_changed_weight(damaged: Exported) -> None:
    graph = onnx.load(damaged.bundle / "model.onnx")
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("towers.finish.1.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1e-2), bias.name))
    onnx.save(graph, damaged.bundle / "model.onnx")
    with pytest.raises(ParityError, match="of 512 golden scores differ") as error:
        check(damaged)
    assert ", finish: trainer" in str(error.value)
    assert ", click: trainer" not in str(error.value)


def test_a_bundle_that_is_not_the_trainer_is_not_written(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    model = "{_target_: tests.unfaithful_model.Unfaithful}"
    train(composed("training.max_steps=2", "training.validation_rows=100", model=model))
    with pytest.raises(ParityError, match=r"nothing is written\. The worst:\n  golden request"):
        export(tmp_path / "run", tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs", "run"]


def test_embedding_groups_and_odd_dims_are_exported(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    model = "{_target_: tests.wide_model.WideAndDeep}"
    train(composed("training.max_steps=3", "training.validation_rows=100", model=model))
    exported = export(tmp_path / "run", tmp_path / "bundle", fp16=True, version="v1")
    assert exported.manifest.release == "tiny_wideanddeep@v1"
    dims = {table.name: table.dim for table in exported.manifest.tables}
    assert (dims["wide.user_id"], dims["user_id"], dims["last_two"]) == (1, 8, 4)


def test_what_a_page_cannot_hold_is_named(tiny_run: Path, tmp_path: Path) -> None:
    def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def edit(state: dict[str, torch.Tensor]) -> None:
            key = next(key for key in state if key.startswith("model.") and "table/item_id" in key)
            state[key][203, 5] = value

        return edit

    spoilt = copy_run(tiny_run, tmp_path / "nan", spoil(float("nan")))
    with pytest.raises(InvalidRelease, match="table 'item_id': id 203, column 5 is nan; rows must be finite"):
        export(spoilt, tmp_path / "bundle")
    spoilt = copy_run(tiny_run, tmp_path / "large", spoil(1e5))
    with pytest.raises(InvalidRelease, match=r"table 'item_id': id 203 has values from .* to 100000; fp16 holds"):
        export(spoilt, tmp_path / "bundle", row_codec="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "nan"]


def test_what_is_no_fit_run_is_refused(tiny_run: Path, bundle: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name another --output, or replace the bundle there with --force"):
        export(tiny_run, bundle.bundle)
    with pytest.raises(ValueError, match=r"is not a run: it has no config\.yaml"):
        export(tmp_path, tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    shutil.copy(tiny_run / "config.yaml", tmp_path / "empty")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        export(tmp_path / "empty", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.experts": 5},
            r"of another configuration: model.model.gates.click.weight is \(5, \d+\) here and \(8",
        ),
        ({"model.tower": [16]}, r"of another configuration: model.model.towers.click.0.layers.0.weight is \(16, 64\)"),
        (
            {"data.features.features[0].buckets": 55},
            "table 'user_id' is 55 x 8 in the run's features and 101 x 8 there",
        ),
        ({"data.labels": ["click"]}, r"it has model\.model\.gates\.finish\.weight, and the run's model has not"),
        ({"data.features.features[4].table": "t"}, "table 't' is 31 x 8 in the run's features and not there"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    tiny_run: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    run = copy_run(tiny_run, tmp_path / "run")
    config = OmegaConf.load(run / "config.yaml")
    for key, value in change.items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_killed_export_stands_in_nobodys_way(tiny_run: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    command = [sys.executable, "-m", "torchrank.cli", "export", "--run", str(tiny_run), "--output", str(bundle)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".bundle.partial-*/tables/*.pages")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    lock, partial = sorted(path.name for path in tmp_path.iterdir())  # no bundle
    assert lock == ".bundle.lock"
    assert partial.startswith(".bundle.partial-")
    exported = export(tiny_run, bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert read_manifest(bundle) == exported.manifest


@pytest.mark.parametrize("kind", ["row_wise", "column_wise"])
def test_tables_that_two_ranks_hold_are_put_together(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    """Against the same checkpoint, read by torch alone."""
    run = tmp_path / "run"
    overrides = ("+model=dnn", f"sharding={kind}", "training.max_steps=3", "data.valid=null")
    train_on_ranks(2, tiny_data, run, *overrides)
    exported = export(run, tmp_path / "bundle", fp16=True)
    for name, wanted in whole_tables(run, tmp_path).items():
        table = next(table for table in exported.manifest.tables if table.name == name)
        assert (table.rows, table.dim) == wanted.shape
        pages = np.fromfile(exported.bundle / "tables" / f"{name}.pages", np.uint8).reshape(table.rows, -1)
        np.testing.assert_array_equal(np.ascontiguousarray(pages[:, : table.row_bytes]).view("<f4"), wanted)


MEASURE = """
import sys
from pathlib import Path
from export.checkpoint_tables import CheckpointTables

def resident(line):
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(s for s in status if s.startswith(line)).split()[1])

tables = CheckpointTables(Path(sys.argv[1]))
next(tables.chunks("small"))  # what torch imports on the way
before, largest = resident("RssAnon"), 0
for chunk in tables.chunks("large"):
    largest = max(largest, resident("RssAnon") - before)
print(largest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_table_is_never_in_memory(tmp_path: Path) -> None:
    """128 MiB of one shard, read in chunks of 2 MiB."""
    prefix = "model.embeddings.pooled.embedding_bags.table"
    tables = {f"{prefix}/small.weight": torch.rand(10, 8), f"{prefix}/large.weight": torch.rand(4 << 20, 8)}
    dcp.save(tables, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CONF.parents[2])
    assert int(done.stdout.split()[-1]) < 32 << 20, done.stdout
    rows = np.concatenate(list(CheckpointTables(tmp_path / "checkpoint").chunks("large")))
    np.testing.assert_array_equal(rows, tables[f"{prefix}/large.weight"].numpy())


def test_the_graph_is_as_large_for_ten_million_rows_as_for_ten_thousand(tiny_data: Path, tmp_path: Path) -> None:
    sizes = {}
    for rows in (10_000, 10_000_000):
        run = tmp_path / str(rows)
        composed = compose_tiny(
            *(tiny_data, run, "+model=dnn", "training.max_steps=1", "data.valid=null"),
            "optimizer.tables.name=rowwise_adagrad",
        )
        OmegaConf.update(composed, "data.features.features[0]", {"buckets": rows, "dim": 4}, force_add=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            train(composed)
        exported = export(run, tmp_path / f"bundle-{rows}", row_codec="fp16", fp16=True, force=True)
        assert exported.manifest.tables[0].rows == rows
        sizes[rows] = [variant.bytes for variant in exported.manifest.variants]
    assert sizes[10_000] == sizes[10_000_000]
    assert max(sizes[10_000]) < 1_000_000
