"""What an inference host imports, with the packages blocked that it does not have."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Imports every module of the packages that are named (but those to be spared), with some top-level packages made
# impossible to import.
WALK = """
import importlib, importlib.abc, pkgutil, sys

blocked, spared = (set(argument.split(",")) for argument in sys.argv[1:3])

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
for root in sys.argv[3:]:
    module = importlib.import_module(root)
    print(root)
    for child in pkgutil.walk_packages(getattr(module, "__path__", []), root + "."):
        if child.name not in spared:
            importlib.import_module(child.name)
            print(child.name)
"""
TRAINING = "torch,torchrec,fbgemm_gpu,hydra,omegaconf,onnx,onnx_ir,onnxscript,onnxconverter_common"
ARROW_ONLY = "torchrank.features.arrow_columns"  # FeatureTransform.from_arrow imports it when it is called
ROOTS = {
    "embedding_store": ["embedding_store"],
    "features": ["torchrank.features"],
    "serving": ["torchrank.serving"],
    "export": ["export.bundle", "export.session", "export.runtime", "export.variants"],
    "commands": ["torchrank.cli", "torchrank.commands"],
}


def walk(blocked: str, *roots: str, spared: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WALK, blocked, spared, *roots], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("roots", ROOTS.values(), ids=ROOTS)
def test_imports_without_torch_onnx_hydra_and_pyarrow(roots: list[str]) -> None:
    result = walk(f"{TRAINING},pyarrow", *roots, spared=ARROW_ONLY)
    assert result.returncode == 0, result.stderr
    assert set(roots) <= set(result.stdout.split())


def test_the_arrow_side_of_features_imports_without_torch_and_hydra() -> None:
    result = walk(TRAINING, "torchrank.features")
    assert result.returncode == 0, result.stderr
    assert ARROW_ONLY in result.stdout.split()


def test_embedding_store_imports_without_torchrank() -> None:
    result = walk(f"{TRAINING},pyarrow,torchrank,export", "embedding_store")
    assert result.returncode == 0, result.stderr


def test_the_block_blocks() -> None:
    result = walk("msgspec", "embedding_store")
    assert "msgspec is blocked" in result.stderr
