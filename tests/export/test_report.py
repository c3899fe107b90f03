"""report.html: one file that loads nothing, says what the manifest says, and is sound markup whatever is in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper

from export.build import ExportOptions, export_run
from export.bundle import Manifest, PassReport, Validation, Variant, read_manifest
from export.html_elements import Html, element, table
from export.report import decades, report_html
from tests.serving.bundle_factory import build_bundle
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run

VOID = {"meta"}


class Reader(HTMLParser):
    """Text of each element in order; fails where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


PASSES = (
    PassReport("user-rows", 7, (40, 52), (2_000_000, 800_000), (4.0, 1.6), 3e-8, None),
    PassReport("fold", 0, (52, 52), (800_000, 800_000), (1.6, 1.6), 0.0, None),
    PassReport(
        "stack", 0, (52, 52), (800_000, 800_000), (1.6, 1.6), 0.0, "ValueError: <script>alert(1)</script> & more"
    ),
    PassReport("other", 0, (52, 52), (800_000, 800_000), (1.6, 1.6), 0.0, "switched off"),
)


WANTED = (
    *("tiny@1", "2.50 × speed-up by the passes", "40% of the FLOPs are left", "fold found nothing"),
    *("user-rows 7 rewrites 52 800 kFLOP 1.6 ms", "other left out : switched off", "1.52 MB", "772 kB"),
    *("click 0.71234", "AUC on 1,234 rows of the valid", "click -2.0e-04", "gate ± 0.0001"),
    *("over a gate, written by --force", "2 nodes Mul_7, Exp_9", "int8 left out : nothing to gain"),
    *("1.9e-04 of 0.002", "user_pooled [U, 24] float32", "user_index [N] int64", "recent_items.length [U] int64"),
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    plain = build_bundle(tmp_path / "bundle").manifest
    variants = (
        Variant("fp32", "model.onnx", "", 1_516_367, 1.2e-7, 1e-5, latency_ms=1.6),
        Variant("fp16", "f", "", 771_568, 1.9e-4, 2e-3, {"click": -2e-4}, 1e-4, False, ("Mul_7", "Exp_9"), 1.62),
    )
    return msgspec.structs.replace(
        plain, passes=PASSES, variants=variants, variants_left_out={"int8": "nothing to gain"},
        validation=Validation("valid", 1234, {"click": 0.71234}),
    )  # fmt: skip


def page_of(manifest: Manifest, differences: dict[str, np.ndarray] | None = None) -> str:
    found = {variant.name: np.array([0.0, 3e-8, 3e-8, variant.max_abs_diff]) for variant in manifest.variants}
    shapes: dict[str, list[str | int]] = {"user_pooled": ["U", 24], "recent_items.length": ["U"], "user_index": ["N"]}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT if len(shape) > 1 else TensorProto.INT64, shape)
        for name, shape in shapes.items()
    ]
    return report_html(manifest, differences or found, inputs)


def test_it_says_what_the_manifest_says(manifest: Manifest) -> None:
    text = " ".join(" ".join(Reader(page_of(manifest)).text).split())
    for wanted in WANTED:
        assert wanted in text, wanted


def test_text_is_escaped_and_nothing_is_loaded(manifest: Manifest) -> None:
    page = page_of(manifest)
    reader = Reader(page)
    assert "ValueError: <script>alert(1)</script> & more" in "".join(reader.text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in reader.tags}
    assert not {"src", "href", "onload", "onclick"} & {name for _, attributes in reader.tags for name in attributes}
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_a_histogram_counts_by_decade() -> None:
    rng = np.random.default_rng(4)
    print("seed 4")
    values = 10 ** rng.uniform(-11, 0, 500)
    values[:20] = 0
    expected = [0] * 10
    for value in values:
        bin = 0
        while bin < 9 and value >= 10.0 ** (bin - 9):
            bin += 1
        expected[bin] += 1
    assert decades(values) == expected
    assert sum(expected) == 500


def test_bars_beyond_the_gate_are_marked(manifest: Manifest) -> None:
    found = {"fp32": np.array([1e-9, 2e-5, 2e-5]), "fp16": np.array([1e-9, 2e-5, 2e-5])}
    tags = Reader(page_of(manifest, found)).tags
    heights = [float(a["height"] or 0) for tag, a in tags if tag == "rect" and a["class"] == "over"]
    assert [height for height in heights if height] == [90.0]  # of fp32, whose gate is 1e-5; fp16's is 2e-3


def test_a_bundle_without_passes_has_a_report(tmp_path: Path) -> None:
    plain = build_bundle(tmp_path / "bundle").manifest
    text = " ".join(Reader(page_of(plain)).text)
    assert "None was run" in text
    assert "speed-up" not in text


def test_elements() -> None:
    assert element("p", "a < b", Html("<i>c</i>"), None, 7, class_="x", data_y='"', z=None) == (
        '<p class="x" data-y="&quot;">a &lt; b<i>c</i>7</p>'
    )
    assert '<td class="number">2</td>' in table(["a", "b"], [[1, 2]], frozenset((1,)))


def test_export_writes_it_where_asked(tiny_run: Path, tmp_path: Path) -> None:
    quiet_libraries()
    export_run(Run(tiny_run), tmp_path / "bundle", ExportOptions(report=True))
    text = "".join(Reader((tmp_path / "bundle" / "report.html").read_text()).text)
    assert read_manifest(tmp_path / "bundle").release in text
    assert "fp32, at most" in text
