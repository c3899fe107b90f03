"""The process group: gloo on CPU, NCCL on CUDA, one process or many, the same code.

How a process ends: a thread of gloo that finished a collective drops its tensors, and takes Python's lock for that.
Where the interpreter is ending by then, CPython ends the thread instead, C++ does not survive that, and the process
aborts with all its work done: "terminate called without an active exception". So the threads of a group are joined
before the interpreter ends, and what joins them is that nobody refers to the group any more.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Both bind `group=dist.group.WORLD` as a default argument when they are first imported, and would keep a group that is
# there by then. So they are imported before there is one.
import torch.distributed.nn.functional
import torch.distributed.optim
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among the others. `control` is a gloo group: host-side agreement never waits for a GPU."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks."""
        return int(self._reduce(torch.tensor([value]), dist.ReduceOp.MAX))

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, on the host."""
        return self._reduce(values.detach().cpu(), dist.ReduceOp.SUM)

    def gather(self, values: Tensor) -> Tensor | None:
        """All ranks' rows one after another, on rank 0; None elsewhere. The ranks may have different row counts."""
        if self.world_size == 1:
            return values
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(values)]), group=self.control)
        longest = int(max(count.item() for count in counts))
        padded = values.new_zeros((longest, *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.world_size)] if self.is_first else None
        dist.gather(padded, parts, dst=0, group=self.control)
        if parts is None:
            return None
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, values: list[str]) -> None:
        """Replaces `values` by the first rank's."""
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.control)

    def on_first(self, action: Callable[[], object]) -> None:
        """Collective: the first rank calls `action`; where that fails, all ranks raise what it says."""
        told = [""]
        try:
            if self.is_first:
                action()
        except Exception as error:
            told = [str(error) or type(error).__name__]
            raise
        finally:
            self.broadcast(told)
        if told[0]:
            raise ValueError(told[0])

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values, op=operation, group=self.control)
        return values


@contextmanager
def process_group(device: str = "auto", threads: int | None = None) -> Iterator[Ranks]:
    """Joins the group that torchrun describes, else makes one of a single process.

    device: "cpu", "cuda" or "auto" (CUDA where there is one); threads: of torch in this process, by default the
    host's cores divided by its ranks.
    """
    _join_threads()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_ranks))
    where = _device(device)
    backend = "nccl" if where.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = dist.GroupMember.WORLD
        assert world is not None
        control = dist.new_group(backend="gloo") if backend != "gloo" else world
        _groups.extend((world, control))
        yield Ranks(dist.get_rank(), dist.get_world_size(), where, control)
    finally:
        dist.destroy_process_group()


_groups: list[dist.ProcessGroup] = []  # that were made here and whose threads may still run


@atexit.register
def _join_threads() -> None:
    """Joins the threads of ended groups that only `_groups` refers to, once cycles of modules are collected.

    The reference from here is the last one because it is Python's, which frees the lock while it joins. That of a
    DistributedDataParallel's reducer does not, and would wait for a thread that waits for the lock.
    """
    failure = getattr(sys, "last_traceback", None)
    if failure is not None:  # was printed; its frames still refer to what the failed function had
        traceback.clear_frames(failure)
    gc.collect()
    _groups.clear()


def _leave_threads() -> None:
    """In a forked child the threads are not there, and joining them would never end: nothing lets go of the groups."""
    for group in _groups:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    _groups.clear()


os.register_at_fork(after_in_child=_leave_threads)


def _device(device: str) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: accepted are auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no CUDA device here; device=cpu runs the same training")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(where)
    return where
