"""A run: the directory of one training.

config.yaml            the resolved configuration; what comes out of the environment stays `${oc.env:NAME}`
plan.json              which rank holds which part of which table
metrics.jsonl          one JSON object per log line and validation
tensorboard/           the same for TensorBoard
checkpoints/step-N/    torch.distributed.checkpoint and progress.json
checkpoints/best       the name of the best one
"""

from __future__ import annotations

import json
import math
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, UnsupportedInterpolationType
from omegaconf.resolvers import oc

from torchrank.training.config import Config

OUTPUTS = Path("outputs")
_LATEST = "latest_run"  # a file in OUTPUTS, not a link: outputs may live where links do not


class Run:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def name(self) -> str:
        return self.folder.name

    def create(self, config: DictConfig) -> None:
        """Raises ValueError where the directory already holds a run."""
        if (self.folder / "config.yaml").exists():
            raise ValueError(
                f"run_dir {self.folder} already holds a run: choose another, or continue that one with resume=true"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(_resolved(config)), self.folder / "config.yaml")

    def config(self) -> Config:
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise ValueError(f"{self.folder} is not a run: it has no config.yaml")
        return typed(OmegaConf.load(path))

    def config_bytes(self) -> bytes:
        return (self.folder / "config.yaml").read_bytes()

    def checkpoint(self) -> Path:
        """The best checkpoint, where validations chose one, else the newest."""
        best = self.checkpoints / "best"
        if best.is_file():
            return self.checkpoints / best.read_text().strip()
        newest = self.newest_checkpoint()
        if newest is None:
            raise ValueError(f"run {self.folder} has no checkpoint yet")
        return newest

    def newest_checkpoint(self) -> Path | None:
        found = sorted(self.checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        return found[-1] if found else None

    def log(self, record: dict[str, Any]) -> None:
        with self._metrics.open("a") as lines:
            lines.write(strict_json(record) + "\n")

    def records(self, kind: str) -> list[dict[str, Any]]:
        """What was logged, `kind` being train or validation."""
        return [record for record in map(json.loads, self._metric_lines()) if record["kind"] == kind]

    def forget_after(self, step: int) -> None:
        """Drops what was logged after `step`: a run that was killed behind its last checkpoint does it again."""
        kept = [line for line in self._metric_lines() if json.loads(line)["step"] <= step]
        write_atomically(self._metrics, "".join(f"{line}\n" for line in kept))

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _metric_lines(self) -> list[str]:
        """Complete ones: a killed writer may leave half a line."""
        text = self._metrics.read_text() if self._metrics.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def remember_as_latest(self) -> None:
        OUTPUTS.mkdir(exist_ok=True)
        write_atomically(OUTPUTS / _LATEST, str(self.folder.resolve()) + "\n")


def typed(config: Any) -> Config:
    """The configuration as dataclasses: unknown keys and wrong types raise omegaconf errors that name the key."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), config)
    result = OmegaConf.to_object(merged)
    assert isinstance(result, Config)
    return result


def _resolved(config: DictConfig) -> Any:
    """As plain values; but one that needs the environment, however indirectly, may be a secret and stays as written."""
    OmegaConf.clear_resolver("oc.env")
    try:
        return _plain(config)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env)


def _plain(node: Any) -> Any:
    if isinstance(node, ListConfig):
        return [_value(node, index) for index in range(len(node))]
    return {key: _value(node, key) for key in node} if isinstance(node, DictConfig) else node


def _value(node: DictConfig | ListConfig, key: Any) -> Any:
    try:
        return _plain(node[key])
    except (MissingMandatoryValue, UnsupportedInterpolationType, InterpolationResolutionError):
        return OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index]


def dated_run() -> Run:
    now = datetime.now().astimezone()
    return Run(OUTPUTS / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S-%f")[:-3])


def find_run(folder: str | Path | None) -> Run:
    """The run in `folder`, else the one that trained last from this working directory. Raises ValueError."""
    if folder is None:
        latest = OUTPUTS / _LATEST
        if not latest.is_file():
            raise ValueError(
                "there is no latest run here: train one (python -m torchrank.train +model=mmoe) or name one (--run DIR)"
            )
        folder = latest.read_text().strip()
    run = Run(Path(folder))
    if not (run.folder / "config.yaml").is_file():
        raise ValueError(f"{run.folder} is not a run: it has no config.yaml")
    return run


def strict_json(value: Any) -> str:
    """`value` in one line; what JSON has no number for (the AUC of a single class is NaN) as null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), allow_nan=False)


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
