"""Which variant `auto` takes. One is made so much slower than the other that no clock can be wrong about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

import export.variants
from export.bundle import InvalidBundle, Manifest, read_manifest, write_manifest
from export.runtime import PROVIDERS, open_session
from export.variants import time_variants
from tests.serving.bundle_factory import HIDDEN, TinyModel, build_bundle
from torchrank.commands.serve import serve

WIDE, LAYERS = 4096, 6


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return build_bundle(tmp_path / "bundle")


def slow_down(path: Path) -> None:
    """`h` goes through wide layers of zeros first, and has their outcome added: the same scores, 500 times the work."""
    proto = onnx.load(path)
    nodes = list(proto.graph.node)
    (place,) = (number for number, node in enumerate(nodes) if node.output[0] == "h")
    kind = next(numpy_helper.to_array(w).dtype for w in proto.graph.initializer if w.name == "hidden")
    narrow, wide = (np.zeros(shape, kind) for shape in ((WIDE, HIDDEN), (HIDDEN, WIDE)))
    nodes[place].output[0] = "h0"
    added, last = [], "h0"
    for layer in range(LAYERS):
        added.append(helper.make_node("MatMul", [last, "wide"], [f"wide{layer}"]))
        added.append(helper.make_node("MatMul", [f"wide{layer}", "narrow"], [f"narrow{layer}"]))
        last = f"narrow{layer}"
    added.append(helper.make_node("Add", ["h0", last], ["h"]))
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[: place + 1], *added, *nodes[place + 1 :]])
    proto.graph.initializer.extend([numpy_helper.from_array(narrow, "narrow"), numpy_helper.from_array(wide, "wide")])
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def failed(folder: Path, *names: str) -> Manifest:
    """The manifest says of these variants that they did not pass their gate."""
    manifest = read_manifest(folder)
    variants = (msgspec.structs.replace(v, passed=v.name not in names) for v in manifest.variants)
    write_manifest(folder, msgspec.structs.replace(manifest, variants=tuple(variants)))
    return read_manifest(folder)


@pytest.mark.parametrize(("slow", "fast"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_the_fastest_is_taken(model: TinyModel, slow: str, fast: str) -> None:
    slow_down(model.folder / model.manifest.variant(slow).file)
    timing = time_variants(model.folder, model.manifest)
    assert timing.fastest == fast
    assert list(timing.milliseconds) == [fast, slow]
    assert 0 < 5 * timing.milliseconds[fast] < timing.milliseconds[slow]
    assert not timing.left_out
    assert str(timing).startswith(f"{fast} {timing.milliseconds[fast]:.3f} ms, {slow} ")


def test_one_that_did_not_pass_its_gate_is_not_timed(model: TinyModel) -> None:
    slow_down(model.folder / "model.onnx")
    timing = time_variants(model.folder, failed(model.folder, "fp16"))
    assert list(timing.milliseconds) == ["fp32"]
    assert str(timing).endswith(" ms; fp16 is left out: it did not pass its gate when it was exported")


def test_one_that_does_not_load_is_left_out(model: TinyModel) -> None:
    (model.folder / "model.onnx").write_bytes(b"no graph")
    timing = time_variants(model.folder, model.manifest)
    assert list(timing.milliseconds) == ["fp16"]
    assert "model.onnx cannot be loaded" in timing.left_out["fp32"]


def spoil(path: Path, *, above: int) -> None:
    """It loads, and fails for more candidates than that: a Reshape, whose size ONNX Runtime sees when it runs."""
    proto = onnx.load(path)
    (sigmoid,) = (node for node in proto.graph.node if node.op_type == "Sigmoid")
    place = list(proto.graph.node).index(sigmoid)
    added = [
        helper.make_node("Shape", ["logits"], ["spoil.rows"], start=0, end=1),
        helper.make_node("Less", ["spoil.limit", "spoil.rows"], ["spoil.many"]),
        helper.make_node("Where", ["spoil.many", "spoil.wrong", "spoil.right"], ["spoil.columns"]),
        helper.make_node("Concat", ["spoil.rest", "spoil.columns"], ["spoil.shape"], axis=0),
        helper.make_node("Reshape", ["logits", "spoil.shape"], ["spoilt"]),
    ]
    constants = {"limit": above, "wrong": 7919, "right": 2, "rest": -1}
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:place], *added, *nodes[place:]])
    proto.graph.node[place + len(added)].input[0] = "spoilt"
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), f"spoil.{name}") for name, value in constants.items()
    )
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def test_one_that_loads_and_does_not_run_is_left_out(model: TinyModel) -> None:
    spoil(model.folder / "model.fp16.onnx", above=100)
    timing = time_variants(model.folder, model.manifest)
    assert list(timing.milliseconds) == ["fp32"]
    assert re.match("a request of 500 candidates fails: .*Reshape.*$", timing.left_out["fp16"])
    spoil(model.folder / "model.onnx", above=100)
    with pytest.raises(InvalidBundle, match=r"tiny@1 has no variant that can be .*: fp32: a request .*; fp16: a req"):
        time_variants(model.folder, model.manifest)


def test_one_that_fails_later_is_left_out(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        """A session that runs a few times."""

        def __init__(self, session: ort.InferenceSession) -> None:
            self.session, self.left = session, 5
            self.get_inputs = session.get_inputs

        def run(self, *arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise RuntimeException("out of memory")
            return self.session.run(*arguments)

    def open_failing(path: Path, **options: Any) -> Any:
        session = open_session(path, **options)
        return Failing(session) if path.name == "model.onnx" else session

    monkeypatch.setattr(export.variants, "open_session", open_failing)
    timing = time_variants(model.folder, model.manifest)
    assert list(timing.milliseconds) == ["fp16"]
    assert timing.left_out == {"fp32": "a request of 500 candidates fails: out of memory"}


def test_none_is_left(model: TinyModel) -> None:
    (model.folder / "model.fp16.onnx").unlink()
    with pytest.raises(InvalidBundle, match=r"tiny@1 has no variant that can be .*: fp32: it did not .*; fp16: .*load"):
        time_variants(model.folder, failed(model.folder, "fp32"))


def test_the_option_takes_every_provider() -> None:
    (option,) = (parameter for parameter in serve.params if parameter.name == "provider")
    assert tuple(option.type.choices) == PROVIDERS  # type: ignore[attr-defined]
