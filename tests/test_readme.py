"""The README's files and commands, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- (file: (?P<file>\S+)|run) -->\n```\w+\n(?P<text>.*?)```\n", re.DOTALL)


def shell(command: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Every block in its order, in a folder outside the checkout: (folder, command -> its standard output)."""
    folder = tmp_path_factory.mktemp("readme")
    blocks = list(BLOCK.finditer((ROOT / "README.md").read_text()))
    assert len(blocks) == 6
    outputs = {}
    for block in blocks:
        if block["file"]:
            path = folder / block["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"])
        else:
            for command in block["text"].strip().splitlines():
                outputs[command] = shell(command, folder)
    return folder, outputs


def test_your_own_data_trains_and_exports(outputs: tuple[Path, dict[str, str]]) -> None:
    folder, printed = outputs
    auc = float(re.search(r"bought\s*│\s*([\d.]+)", printed["torchrank evaluate"])[1])  # type: ignore[index]
    assert auc > 0.6
    manifest = json.loads((folder / "shop/bundle/manifest.json").read_text())
    assert manifest["schema"]["tasks"] == ["bought"]


def test_your_own_data_takes_30_lines(outputs: tuple[Path, dict[str, str]]) -> None:
    assert len((outputs[0] / "shop/data/shop.yaml").read_text().splitlines()) <= 30


def test_your_own_model_trains_and_exports(outputs: tuple[Path, dict[str, str]]) -> None:
    folder, printed = outputs
    assert json.loads(printed["torchrank evaluate --json"].splitlines()[-1])["bought"]["auc"] > 0.6
    assert json.loads((folder / "shop/linear_bundle/manifest.json").read_text())["model"] == "shop_linear"


def test_every_link_leads_somewhere() -> None:
    for document in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
