"""Checkpoints by torch.distributed.checkpoint: every rank writes its shards, any number of ranks reads them.

Tensors are in the checkpoint; what is not a tensor (step, data position, best metric) is in `progress.json` beside
it. A checkpoint appears by rename, whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel

from torchrank.training.distributed import Ranks
from torchrank.training.run import Run, write_atomically


@dataclass
class Progress:
    """Where a training stands. rows_read: per rank, of the current epoch's stream."""

    step: int = 0
    epoch: int = 0
    rows_read: list[int] = field(default_factory=list)
    best: float | None = None  # mean validation AUC
    best_step: int | None = None
    validations_since_best: int = 0
    validated_step: int | None = None


def save_checkpoint(
    run: Run,
    progress: Progress,
    sharded: DistributedModelParallel,
    dense_optimizers: dict[str, torch.optim.Optimizer],
    ranks: Ranks,
) -> Path:
    """Collective. Returns the checkpoint's folder."""
    target = run.checkpoints / f"step-{progress.step}"
    if target.exists():  # a validation came after it, or a resumed run stopped before its first step
        if ranks.is_first:
            write_atomically(target / "progress.json", json.dumps(asdict(progress)))
        ranks.barrier()
        return target
    temporary = run.checkpoints / f".step-{progress.step}.tmp"
    state = _state(sharded, dense_optimizers, ranks)
    dcp.save(state, checkpoint_id=temporary, process_group=ranks.control)
    if ranks.is_first:
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)))
        temporary.rename(target)
    ranks.barrier()
    return target


def load_checkpoint(
    folder: Path,
    sharded: DistributedModelParallel,
    dense_optimizers: dict[str, torch.optim.Optimizer],
    ranks: Ranks,
) -> tuple[Progress, list[str]]:
    """Collective: model, optimizers and random state, in place. Returns, too, which optimizer state it does not have:
    that of another rule, or of tables that were sharded in another way."""
    for optimizer in dense_optimizers.values():
        _make_optimizer_state(optimizer)
    saved = _saved_keys(folder)
    wanted = _state(sharded, dense_optimizers, ranks)
    state = {key: value for key, value in wanted.items() if key in saved or key.startswith("model.")}
    _load_into(folder, state, ranks)
    _set_random_state(state, ranks)
    absent = sorted(key for key in wanted.keys() - state.keys() if not key.startswith("rng."))
    return Progress(**json.loads((folder / "progress.json").read_text())), absent


def load_weights(folder: Path, sharded: DistributedModelParallel, ranks: Ranks) -> None:
    """Collective: tables and dense parameters only. Raises ValueError where the checkpoint is of another model."""
    _load_into(folder, {f"model.{key}": value for key, value in sharded.state_dict().items()}, ranks)


def keep_checkpoints(run: Run, keep: int) -> None:
    """Removes this run's own older checkpoints, all but the newest `keep` and the best."""
    best = run.checkpoints / "best"
    best_name = best.read_text().strip() if best.is_file() else None
    found = sorted(run.checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for folder in found[: -max(keep, 1)]:
        if folder.name != best_name:
            shutil.rmtree(folder)
    for folder in run.checkpoints.glob(".step-*.tmp"):  # of a training that was killed while saving
        shutil.rmtree(folder)


def mark_best(run: Run, folder: Path) -> None:
    write_atomically(run.checkpoints / "best", folder.name + "\n")


def _state(
    sharded: DistributedModelParallel, dense_optimizers: dict[str, torch.optim.Optimizer], ranks: Ranks
) -> dict[str, Any]:
    """Everything as one flat dict of tensors: a flat dict needs no pickled structure."""
    state: dict[str, Any] = {f"model.{key}": value for key, value in sharded.state_dict().items()}
    for table, values in sharded.fused_optimizer.state_dict()["state"].items():
        state |= {f"table_optimizer.{table}.{key}": value for key, value in values.items()}
    names = {parameter: name for name, parameter in sharded.named_parameters()}
    for which, optimizer in dense_optimizers.items():
        for parameter, values in optimizer.state.items():
            state |= {f"{which}.{names[parameter]}.{key}": value for key, value in values.items()}
    state[f"rng.{ranks.rank}"] = torch.get_rng_state()
    if ranks.device.type == "cuda":
        state[f"rng.cuda.{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _set_random_state(state: dict[str, Any], ranks: Ranks) -> None:
    """A rank more than there were keeps its own."""
    if (rng := state.get(f"rng.{ranks.rank}")) is not None:
        torch.set_rng_state(rng)
    if (rng := state.get(f"rng.cuda.{ranks.rank}")) is not None:
        torch.cuda.set_rng_state(rng, ranks.device)


def _make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Torch makes optimizer state in the first step: one with rate and gradients of zero changes nothing else."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _saved_keys(folder: Path) -> set[str]:
    return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def _load_into(folder: Path, state: dict[str, Any], ranks: Ranks) -> None:
    missing = sorted(set(state) - _saved_keys(folder))
    if missing:
        raise ValueError(
            f"checkpoint {folder} is of another configuration: it has no {missing[0]} ({len(missing)} of {len(state)} "
            "tensors are missing)"
        )
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, value in state.items():
        found, wanted = tuple(getattr(metadata[key], "size", ())), tuple(value.size())
        if isinstance(value, Tensor | nn.Parameter) and not key.startswith("rng.") and found != wanted:
            raise ValueError(f"checkpoint {folder} is of another configuration: {key} is {found} there, {wanted} here")
    dcp.load(state, checkpoint_id=folder, process_group=ranks.control)
