"""Graph and scorer against torch, for every number of users and candidates and every filling of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from omegaconf import OmegaConf

from export.runtime import open_session
from export.session import Scorer
from tests.export.torch_bundle import LENGTHS, TorchBundle, torch_bundle
from tests.models.test_model_contract import MODELS, named

# Users, candidates: large and small ones in turn, as a session's memory meets them.
SHAPES = [(8, 5000), (1, 1), (1, 5000), (8, 1), (1, 500), (1, 2), (5, 700), (8, 8), (3, 41), (2, 1)]


def cases() -> list[Any]:
    """Every model; where its YAML has the option, also with attention over the history."""
    found = []
    for path in MODELS:
        found.append(pytest.param((path, {}), id=path.stem))
        if "attention" in OmegaConf.load(path):
            found.append(pytest.param((path, {"attention": {"history": "item"}}), id=f"{path.stem}-attention"))
    return found


@pytest.fixture(scope="module", params=cases())
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchBundle:
    path, overrides = request.param
    return torch_bundle(tmp_path_factory.mktemp("shapes") / "bundle", path, **overrides)


@pytest.mark.parametrize("variant", ["fp32", "optimised"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_shape_scores_as_torch_does(bundle: TorchBundle, lengths: str, variant: str) -> None:
    """All through one scorer and one session."""
    scorer = Scorer(bundle.folder, bundle.store, variant=variant)
    session = open_session(bundle.folder / bundle.manifest.variant(variant).file)
    taken = {node.name for node in session.get_inputs()}
    for seed, (users, candidates) in enumerate(SHAPES):
        batch = bundle.batch(users, candidates, lengths, seed)
        inputs = bundle.inputs(batch)
        expected = bundle.expected(inputs)
        scores = scorer.score(batch)
        assert scores.absent == 0
        feed = {name: value.numpy() for name, value in named(inputs, bundle.schema).items() if name in taken}
        alone = dict(zip(bundle.schema.tasks, session.run(list(bundle.schema.tasks), feed), strict=True))
        for task, values in expected.items():
            where = f"{task}, U {users}, N {candidates}, sequences: {lengths}, seed {seed}"
            assert scores.tasks[task].shape == (candidates,), where
            np.testing.assert_allclose(alone[task], values, atol=1e-5, rtol=0, err_msg=where)
            np.testing.assert_allclose(scores.tasks[task], values, atol=1e-5, rtol=0, err_msg=where)


def test_weights_beside_the_graph_score_the_same(bundle: TorchBundle, tmp_path: Path) -> None:
    """Graphs over 2 GB have theirs in a file of its own."""
    batch = bundle.batch(3, 41, "any", seed=7)
    inline = Scorer(bundle.folder, bundle.store).score(batch)
    (tmp_path / "manifest.json").write_bytes((bundle.folder / "manifest.json").read_bytes())
    proto = onnx.load(bundle.folder / "model.onnx")
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    for file in (tmp_path / "model.onnx", *bundle.folder.glob("*.onnx")):
        onnx.checker.check_model(str(file), full_check=True)
    assert (tmp_path / "model.onnx").stat().st_size < (bundle.folder / "model.onnx").stat().st_size / 2
    beside = Scorer(tmp_path, bundle.store).score(batch)
    for task, values in inline.tasks.items():
        np.testing.assert_array_equal(beside.tasks[task], values)
