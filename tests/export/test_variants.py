"""Which variant `auto` takes. One is made so much slower than the other that no clock can be wrong about it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.bundle import InvalidBundle, Manifest, read_manifest, write_manifest
from export.runtime import PROVIDERS
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


def test_none_is_left(model: TinyModel) -> None:
    (model.folder / "model.fp16.onnx").unlink()
    with pytest.raises(InvalidBundle, match=r"tiny@1 has no variant that can be .*: fp32: it did not .*; fp16: .*load"):
        time_variants(model.folder, failed(model.folder, "fp32"))


def test_the_option_takes_every_provider() -> None:
    (option,) = (parameter for parameter in serve.params if parameter.name == "provider")
    assert tuple(option.type.choices) == PROVIDERS  # type: ignore[attr-defined]
