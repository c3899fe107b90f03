"""requirements/*.txt against each other and against pyproject.toml (scripts/lock writes them)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {path.stem: path for path in (ROOT / "requirements").glob("*.txt")}
EXTRAS = {"cpu": ["train", "serve", "dev"], "gpu": ["train", "serve", "dev"], "serve": ["serve"]}


def locked(name: str) -> dict[str, Requirement]:
    lines = LOCKS[name].read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.lstrip().startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def asked(extras: list[str]) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def test_the_locks_are_these() -> None:
    assert set(LOCKS) == {*EXTRAS, "build"}


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_one_exact_version(name: str) -> None:
    for requirement in locked(name).values():
        assert re.fullmatch(r"==[0-9][^*,]*", str(requirement.specifier)), requirement
        assert requirement.url is None, requirement


@pytest.mark.parametrize("name", LOCKS)
def test_no_host_and_no_folder_is_written_down(name: str) -> None:
    text = LOCKS[name].read_text()
    assert not re.search(r"://|--index|--find-links|--extra-index|(^|\s)/\w", text)
    assert "scripts/lock" in text.splitlines()[1]  # the command that writes it


@pytest.mark.parametrize("name", EXTRAS)
def test_what_pyproject_asks_is_locked(name: str) -> None:
    found = locked(name)
    for requirement in asked(EXTRAS[name]):
        project = canonicalize_name(requirement.name)
        if (name, project) == ("cpu", "fbgemm-gpu"):
            project = canonicalize_name("fbgemm-gpu-cpu")
        assert project in found, f"{requirement}: run scripts/lock"
        version = str(found[project].specifier).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: run scripts/lock"


@pytest.mark.parametrize("name", ["cpu", "serve", "build"])
def test_a_package_has_one_version_in_all_locks(name: str) -> None:
    gpu = locked("gpu")
    for project, requirement in locked(name).items():
        if project in gpu:
            assert requirement.specifier == gpu[project].specifier, project


def test_cpu_has_no_cuda() -> None:
    assert not [name for name in locked("cpu") if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert set(locked("gpu")) - set(locked("cpu")) > {"fbgemm-gpu", "triton"}
    assert set(locked("cpu")) - set(locked("gpu")) == {"fbgemm-gpu-cpu"}


def test_serve_has_nothing_of_training() -> None:
    training = {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "hydra-core", "omegaconf", "pyarrow", "onnx"}
    assert not training & set(locked("serve"))
