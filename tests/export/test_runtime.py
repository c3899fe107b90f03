"""What ONNX Runtime is asked for, and that it is never less than that in silence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.bundle import InvalidBundle
from export.runtime import OLDEST, Provider, UnfitRuntime, check_version, open_session

ROOT = Path(__file__).parents[2]
WIDTH = 1024


def write_graph(path: Path, *, weight: np.ndarray | None = None, external: bool = False) -> None:
    """y [N] = Σ over the columns of x [N, 1024] (of x ∘ weight, where one is given)."""
    nodes, constants, summed = [], [numpy_helper.from_array(np.array([1], np.int64), "axis")], "x"
    if weight is not None:
        nodes.append(helper.make_node("Mul", ["x", "weight"], ["weighted"]))
        constants.append(numpy_helper.from_array(weight, "weight"))
        summed = "weighted"
    nodes.append(helper.make_node("ReduceSum", [summed, "axis"], ["y"], keepdims=0))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])
    graph = helper.make_graph(nodes, "sum", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    location = f"{path.name}.data" if external else None
    onnx.save(model, path, save_as_external_data=external, location=location, size_threshold=WIDTH)
    onnx.checker.check_model(str(path), full_check=True)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    write_graph(path)
    return path


def test_options(graph: Path) -> None:
    options = open_session(graph, threads=2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    spinning = open_session(graph, threads=2, spin=True).get_session_options()
    assert spinning.get_session_config_entry("session.intra_op.allow_spinning") == "1"


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_built_in(graph: Path, provider: Provider) -> None:
    """The lock files have the CPU's onnxruntime."""
    expected = rf"provider '{provider}': the installed onnxruntime [\d.]+ has no \w+ExecutionProvider; available: cpu; "
    with pytest.raises(UnfitRuntime, match=rf"{expected}{provider} comes with onnxruntime-gpu, installed in place of"):
        open_session(graph, provider=provider)


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize(
    ("provider", "name"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_provider_that_onnx_runtime_passes_over(
    graph: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider, name: str
) -> None:
    """It makes a session of the CPU and is content, as with onnxruntime-gpu on a host that has no CUDA."""
    available = ort.get_available_providers()
    assert ort.InferenceSession(graph, providers=[name, "CPUExecutionProvider"]).get_providers() == [
        "CPUExecutionProvider"
    ]
    monkeypatch.setattr(ort, "get_available_providers", lambda: [name, *available])
    with pytest.raises(UnfitRuntime, match=rf"(?s){name} does not load .* has only CPUExecutionProvider") as error:
        open_session(graph, provider=provider)
    assert "nothing runs on the CPU instead" in str(error.value)


def test_a_provider_that_raises(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT does without its libraries."""

    def fail(*_: object, **options: object) -> None:
        assert options["enable_fallback"] == 0
        raise RuntimeError("Please install TensorRT libraries")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(UnfitRuntime, match=r"(?s)does not load on this host: .*Please install TensorRT libraries"):
        open_session(graph, provider="tensorrt")


@pytest.mark.parametrize("found", ["1.22.1", "1.9.0", "0.23.4", "unknown"])
def test_a_runtime_that_is_too_old(found: str) -> None:
    with pytest.raises(
        UnfitRuntime, match=re.escape(f"onnxruntime {found} is installed; accepted: 1.23 or newer: pip")
    ):
        check_version(found)


@pytest.mark.parametrize("found", ["1.23.0", "1.31.1", "1.100.0", "2.0.0", "1.24.0.dev20251031001"])
def test_a_runtime_that_is_new_enough(found: str) -> None:
    check_version(found)


def test_the_version_is_looked_at_before_a_graph_is_loaded(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.18.0")
    with pytest.raises(UnfitRuntime, match=r"onnxruntime 1\.18\.0 is installed"):
        open_session(graph)


def test_the_oldest_version_is_that_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("serve", "train"):
        assert f"onnxruntime>={'.'.join(map(str, OLDEST))}" in extras[extra], extra


def test_weights_in_a_file_beside_the_graph(tmp_path: Path) -> None:
    seed = 11
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=WIDTH).astype(np.float32), rng.normal(size=(9, WIDTH)).astype(np.float32)
    path = tmp_path / "model.onnx"
    write_graph(path, weight=weight, external=True)
    assert (tmp_path / "model.onnx.data").stat().st_size >= weight.nbytes
    (scores,) = open_session(path).run(["y"], {"x": x})
    np.testing.assert_allclose(scores, x.astype(np.float64) @ weight.astype(np.float64), atol=1e-4)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(InvalidBundle, match=r"model\.onnx cannot be loaded: .*model\.onnx\.data"):
        open_session(path)


INPUT_MB = 256
COPIES = f"""
import json, sys
from pathlib import Path
import numpy as np
from export.runtime import open_session

def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

session = open_session(Path(sys.argv[1]))
x = np.ones(({INPUT_MB} << 18, 1), np.float32).reshape(-1, {WIDTH})
before = peak()
(scores,) = session.run(["y"], {{"x": x}})
after = peak()
(copied,) = session.run(["y"], {{"x": np.asfortranarray(x)}})
print(json.dumps([after - before, peak() - before, float(scores.min()), float(scores.max()), float(copied.min())]))
"""


def test_inputs_are_read_where_they_are(graph: Path) -> None:
    """Peak memory: an input that had to be copied would double. (A transposed one shows that the measure sees it.)"""
    result = subprocess.run(
        [sys.executable, "-c", COPIES, graph], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    grown, grown_by_copies, least, most, copied = json.loads(result.stdout)
    assert (least, most, copied) == (WIDTH, WIDTH, WIDTH)
    assert grown < INPUT_MB / 8, f"{grown:.0f} MB more for an input of {INPUT_MB} MB"
    assert grown_by_copies > INPUT_MB
