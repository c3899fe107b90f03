"""The import-linter contracts of pyproject.toml name every module: one on no floor would be held by nothing."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# On no floor: the package's own __init__, and what any floor may ask where conf/ is.
FREE = {"torchrank.config_dir"}


def test_every_module_of_torchrank_is_on_a_floor() -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = next(contract for contract in linter["contracts"] if contract["type"] == "layers")["layers"]
    named = {name.strip(" ()") for floor in floors for name in floor.split(":")}
    package = ROOT / "torchrank"
    modules = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    present = {f"torchrank.{name}" for name in modules - {"__init__"}} | {"embedding_store", "export"}
    assert not present - named - FREE


def test_every_folder_of_modules_is_a_package() -> None:
    """import-linter passes over a folder without __init__.py."""
    for name in ("torchrank", "embedding_store", "export"):
        for module in (ROOT / name).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module.parent
