"""The scorer on a real graph, against float64 loops over the raw values."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from embedding_store.codec import encode
from embedding_store.errors import InvalidRelease, UnknownRelease
from embedding_store.lookup import STALE, UNAVAILABLE, LookupReply, TableRows
from embedding_store.memory import MemoryStore
from embedding_store.release import ReleaseManifest
from export.bundle import InvalidBundle, read_manifest, write_manifest
from export.session import Scorer
from tests.serving.bundle_factory import ITEM_ROWS, TASKS, TinyModel, blank_request, build_bundle, random_request
from torchrank.features.batch import FeatureBatch, Ragged, SideBatch
from torchrank.features.transform import FeatureTransform


def memory_store(model: TinyModel) -> MemoryStore:
    store = MemoryStore()
    manifest = ReleaseManifest("tiny", model.manifest.version, model.manifest.created, model.manifest.tables)
    store.add(manifest, {t.name: encode(t.codec, model.tables[t.name]) for t in manifest.tables})
    return store


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return build_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("variant", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_scores_equal_the_model_computed_by_hand(tmp_path: Path, seed: int, variant: str, tolerance: float) -> None:
    model = build_bundle(tmp_path / "bundle", seed=seed, codec="fp16")
    scorer = Scorer(model.folder, memory_store(model), variant=variant)
    request = random_request(np.random.default_rng(seed), 40)
    scores = scorer.score(FeatureTransform(model.manifest.features).from_request(**request))
    assert scores.release == "tiny@1"
    assert scores.absent == 0
    for task, expected in model.expected(**request).items():
        assert scores.tasks[task].dtype == np.float32
        np.testing.assert_allclose(scores.tasks[task], expected, atol=tolerance, err_msg=f"{task}, seed {seed}")


def test_a_graph_that_takes_halves_is_fed_halves(model: TinyModel) -> None:
    graph = onnx.load(model.folder / "model.onnx")
    casts = []
    for node in graph.graph.input:
        if node.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            node.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
            for reader in graph.graph.node:
                reader.input[:] = [f"{name}.wide" if name == node.name else name for name in reader.input]
            casts.append(onnx.helper.make_node("Cast", [node.name], [f"{node.name}.wide"], to=onnx.TensorProto.FLOAT))
    graph.graph.node.extend(casts)
    graph.graph.node.sort(key=lambda node: node.op_type != "Cast" or not node.output[0].endswith(".wide"))
    onnx.save(graph, model.folder / "model.onnx")
    scorer = Scorer(model.folder, memory_store(model))
    request = random_request(np.random.default_rng(1), 40)
    scores = scorer.score(FeatureTransform(model.manifest.features).from_request(**request))
    for task, expected in model.expected(**request).items():
        np.testing.assert_allclose(scores.tasks[task], expected, atol=5e-3)


def test_several_requests_at_once_score_as_each_alone(model: TinyModel) -> None:
    scorer = Scorer(model.folder, memory_store(model))
    transform = FeatureTransform(model.manifest.features)
    rng = np.random.default_rng(3)
    batches = [transform.from_request(**random_request(rng, n)) for n in (1, 7, 3)]
    together = scorer.score(_stacked(batches))
    for task in TASKS:
        alone = np.concatenate([scorer.score(batch).tasks[task] for batch in batches])
        np.testing.assert_allclose(together.tasks[task], alone, atol=1e-6)


def test_absent_ids_are_counted_and_take_the_default_row(model: TinyModel) -> None:
    """One id that is absent twice counts twice, though a store may answer it with one row."""
    scorer = Scorer(model.folder, memory_store(model))
    transform = FeatureTransform(model.manifest.features)
    batch = transform.from_request(**blank_request(*({"item_id": i, "price": 1.0} for i in (5, 6, 7))))
    beyond = ITEM_ROWS + 1  # one row past the table's last, which is the one for unknown ids
    ragged = Ragged(np.array([beyond, beyond, 7]), batch.item.sparse["item_id"].offsets)
    sparse = {**batch.item.sparse, "item_id": ragged}
    changed = FeatureBatch(batch.user, SideBatch(3, sparse, batch.item.dense), batch.user_index)
    scores = scorer.score(changed)
    assert scores.absent == 2
    empty = model.expected(**blank_request({"price": 1.0}))  # no item_id: zeros, like the default row
    np.testing.assert_allclose(scores.tasks["click"][:2], empty["click"] * 2, atol=1e-6)
    last = model.expected(**blank_request({"item_id": 7, "price": 1.0}))
    np.testing.assert_allclose(scores.tasks["click"][2:], last["click"], atol=1e-6)


def test_threads_share_a_scorer(model: TinyModel) -> None:
    scorer = Scorer(model.folder, memory_store(model), threads=2)
    transform = FeatureTransform(model.manifest.features)
    requests = [random_request(np.random.default_rng(seed), 1 + seed * 37 % 200) for seed in range(48)]

    def check(request: dict) -> None:
        scores = scorer.score(transform.from_request(**request))
        for task, expected in model.expected(**request).items():
            np.testing.assert_allclose(scores.tasks[task], expected, atol=1e-5)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(check, requests))


def test_buffers_go_to_the_graph_as_they_are(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `session.run` reads without a copy is contiguous and of the graph's own type; and dense values and
    `user_index` are the features' own memory."""
    scorer = Scorer(model.folder, memory_store(model))
    batch = FeatureTransform(model.manifest.features).from_request(**random_request(np.random.default_rng(4), 500))
    session, fed = scorer._session, {}

    class Spy:
        def run(self, outputs: list[str], feed: dict[str, NDArray]) -> list[NDArray]:
            fed.update(feed)
            return session.run(outputs, feed)

    monkeypatch.setattr(scorer, "_session", Spy())
    scorer.score(batch)
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    assert {name: values.dtype for name, values in fed.items()} == {
        node.name: types[node.type] for node in session.get_inputs()
    }
    for name, values in fed.items():
        assert values.flags.c_contiguous, name
        assert values.flags.aligned, name
    assert np.shares_memory(fed["item_dense"], batch.item.dense)
    assert np.shares_memory(fed["user_index"], batch.user_index)


class PartlyDown(MemoryStore):
    """Answers, but could not ask for one row of `item_id`; remembers the timeout it was given."""

    timeout: float | None = None

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        self.timeout = timeout
        reply = super().lookup(release, ids)
        rows = reply.tables["item_id"]
        status = rows.status.copy()
        status[:3] = UNAVAILABLE, STALE, STALE
        return LookupReply(release, {**reply.tables, "item_id": TableRows(rows.rows, status, rows.index)})


def test_rows_that_are_not_the_ids_own_are_counted(model: TinyModel) -> None:
    store = PartlyDown()
    store.add(
        ReleaseManifest("tiny", "1", "", model.manifest.tables),
        {t.name: encode(t.codec, model.tables[t.name]) for t in model.manifest.tables},
    )
    scorer = Scorer(model.folder, store)
    batch = FeatureTransform(model.manifest.features).from_request(
        **blank_request({"item_id": 1}, {"item_id": 2}, {"item_id": 2})
    )
    scores = scorer.score(batch, timeout=0.25)
    assert (scores.absent, scores.unavailable, scores.stale) == (0, 1, 2)
    assert store.timeout == 0.25


def test_an_unknown_variant_names_those_there_are(model: TinyModel) -> None:
    with pytest.raises(InvalidBundle, match="bundle tiny@1 has no variant 'int8'; it has: fp32, fp16"):
        Scorer(model.folder, memory_store(model), variant="int8")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundle, match="is not a bundle: No such file or directory"):
        Scorer(tmp_path / "nothing", MemoryStore())


def test_an_unpublished_release_says_how_to_publish(model: TinyModel) -> None:
    with pytest.raises(
        UnknownRelease, match=r"tiny@1 is not in the store; publish it with: torchrank publish .*bundle"
    ):
        Scorer(model.folder, MemoryStore())


def test_a_store_with_another_bundle_under_this_name(model: TinyModel, tmp_path: Path) -> None:
    other = build_bundle(tmp_path / "other", seed=2)
    with pytest.raises(
        InvalidRelease, match=r"table 'age' has sha256 '\w+' in the bundle, '\w+' in the store; .* a new version"
    ):
        Scorer(model.folder, memory_store(other))


def test_a_store_without_one_of_the_tables(model: TinyModel) -> None:
    store = MemoryStore()
    rest = tuple(table for table in model.manifest.tables if table.name != "hour")
    store.add(ReleaseManifest("tiny", "1", "", rest), {t.name: encode(t.codec, model.tables[t.name]) for t in rest})
    with pytest.raises(InvalidRelease, match="table 'hour' is only in the bundle"):
        Scorer(model.folder, store)


def test_a_corrupt_graph(model: TinyModel) -> None:
    (model.folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InvalidBundle, match=r"model\.onnx cannot be loaded: .*Protobuf"):
        Scorer(model.folder, memory_store(model))


def test_a_missing_graph(model: TinyModel) -> None:
    (model.folder / "model.onnx").unlink()
    with pytest.raises(InvalidBundle, match=r"model\.onnx cannot be loaded: .*[Ff]ile"):
        Scorer(model.folder, memory_store(model))


def test_a_graph_with_other_columns_than_the_schema(model: TinyModel) -> None:
    manifest = read_manifest(model.folder)
    schema = msgspec.structs.replace(manifest.schema, item_dense=("price", "duration", "rating"))
    write_manifest(model.folder, msgspec.structs.replace(manifest, schema=schema))
    with pytest.raises(InvalidBundle, match="input 'item_dense' of the graph has 2 columns, but 3 in the manifest"):
        Scorer(model.folder, memory_store(model))


def test_a_graph_without_a_task(model: TinyModel) -> None:
    manifest = read_manifest(model.folder)
    schema = msgspec.structs.replace(manifest.schema, tasks=("click", "share"))
    write_manifest(model.folder, msgspec.structs.replace(manifest, schema=schema))
    with pytest.raises(InvalidBundle, match="no output for: share; it has: click, finish"):
        Scorer(model.folder, memory_store(model))


def _stacked(batches: list[FeatureBatch]) -> FeatureBatch:
    users = np.concatenate([batch.user_index + i for i, batch in enumerate(batches)])
    return FeatureBatch(_stacked_side([b.user for b in batches]), _stacked_side([b.item for b in batches]), users)


def _stacked_side(sides: list[SideBatch]) -> SideBatch:
    sparse = {}
    for name in sides[0].sparse:
        parts = [side.sparse[name] for side in sides]
        offsets = np.concatenate(([0], np.cumsum(np.concatenate([part.lengths for part in parts]))))
        sparse[name] = Ragged(np.concatenate([part.values for part in parts]), offsets.astype(np.int64))
    return SideBatch(sum(side.rows for side in sides), sparse, np.concatenate([side.dense for side in sides]))
