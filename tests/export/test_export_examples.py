"""The examples of docs/export.md, run as they stand there, where nothing of this project can be imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from embedding_store.codec import CODECS, decode, encode
from embedding_store.release import Codec
from export.graph import OPSET
from export.runtime import OLDEST
from tests.export.torch_bundle import TorchBundle, torch_bundle
from tests.models.test_model_contract import MODELS
from tests.serving.bundle_factory import build_bundle
from torchrank.models import ModelInputs

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"
EXAMPLES = dict(re.findall(r"^```python (.+)\n((?:.*\n)+?)```$", DOCUMENT.read_text(), re.MULTILINE))

# Runs a file as `python FILE …` would, with packages made impossible to import, and keeps the arrays of its `feed`.
ALONE = """
import importlib.abc, runpy, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torchrank", "export", "embedding_store", "torch", "onnx", "msgspec", "numba"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
kept = sys.argv.pop(1)
del sys.argv[0]
names = runpy.run_path(sys.argv[0], run_name="__main__")
if "feed" in names:
    import numpy
    numpy.savez(kept, **names["feed"])
"""


def run(name: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    (folder / name).write_text(EXAMPLES[name])
    command = [sys.executable, "-c", ALONE, folder / "feed.npz", folder / name, *arguments]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TorchBundle:
    (mmoe,) = (path for path in MODELS if path.stem == "mmoe")
    return torch_bundle(tmp_path_factory.mktemp("alone") / "bundle", mmoe, attention={"history": "item"})


def test_all_examples_were_read() -> None:
    assert set(EXAMPLES) == {"bundle.py", "rows.py"}
    assert len(EXAMPLES) == DOCUMENT.read_text().count("```python")


def test_a_bundle_runs_by_30_lines_of_numpy_and_onnxruntime(bundle: TorchBundle, tmp_path: Path) -> None:
    """Its scores are those that torch gives for the inputs it made."""
    assert EXAMPLES["bundle.py"].count("\n") <= 30
    assert set(re.findall(r"^(?:import|from) (\w+)", EXAMPLES["bundle.py"], re.MULTILINE)) == {
        "json", "sys", "pathlib", "numpy", "onnxruntime",
    }  # fmt: skip
    result = run("bundle.py", tmp_path, bundle.folder)
    assert result.returncode == 0, result.stderr
    given = {name: torch.from_numpy(values) for name, values in np.load(tmp_path / "feed.npz").items()}
    sequences = [sequence.name for sequence in bundle.schema.sequences]
    inputs = ModelInputs(
        *(given[name] for name in ("user_pooled", "item_pooled", "user_dense", "item_dense", "user_index")),
        sequences={name: given[name] for name in sequences},
        lengths={name: given[f"{name}.length"] for name in sequences},
    )
    assert len(inputs.user_pooled) == 2
    scores = json.loads(result.stdout)
    expected = bundle.expected(inputs)
    assert list(scores) == list(expected)
    for task, values in expected.items():
        assert len(values) == 5
        np.testing.assert_allclose(scores[task], values, atol=1e-5, rtol=0, err_msg=task)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_read_by_numpy(codec: Codec, tmp_path: Path) -> None:
    model = build_bundle(tmp_path / "bundle", codec=codec)
    ids = [7, 0, 999, 7]
    result = run("rows.py", tmp_path, model.folder, "item_id", *map(str, ids))
    assert result.returncode == 0, result.stderr
    expected = decode(codec, encode(codec, model.tables["item_id"][ids])).astype(np.float32)
    np.testing.assert_allclose(json.loads(result.stdout), expected, rtol=1e-6, atol=0)
    np.testing.assert_allclose(expected, model.tables["item_id"][ids], atol=0.01 if codec == "int8" else 1e-6)


def test_the_examples_cannot_import_this_project(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import export.session\n")
    command = [sys.executable, "-c", ALONE, tmp_path / "feed.npz", tmp_path / "own.py"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert "export.session is blocked" in result.stderr or "export is blocked" in result.stderr


def test_the_versions_are_those_of_the_code(bundle: TorchBundle) -> None:
    ir = onnx.load(bundle.folder / "model.onnx").ir_version
    text = DOCUMENT.read_text()
    assert f"ONNX opset {OPSET} and IR version {ir}" in text
    assert f"ONNX Runtime {'.'.join(map(str, OLDEST))} and newer" in text
