"""How a rank ends: without threads of gloo, which the end of the interpreter would abort on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.tiny import CONF, SMALL, run_module
from torchrank.training.distributed import process_group


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads") / "run"
    overrides = ("+model=mmoe", "model.attention={history: item_id}", "sharding=row_wise", "training.max_steps=4")
    arguments = ("--config-dir", str(CONF), "data=tiny", f"data.path={tiny_data}", f"run_dir={folder}", *SMALL)
    check_ranks_end_without_threads("torchrank.train", *arguments, *overrides, cwd=folder.parent)
    return folder


def check_ranks_end_without_threads(module: str, *arguments: str, cwd: Path) -> None:
    done = run_module("tests.training.gloo_threads", module, *arguments, cwd=cwd, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gloo threads left: 0") == 2, done.stdout


def test_train_and_predict_leave_no_thread(run: Path, tiny_data: Path) -> None:
    arguments = ("--run", str(run), "--data", str(tiny_data / "valid.parquet"), "--output", str(run / "scores"))
    check_ranks_end_without_threads("torchrank.predict", *arguments, cwd=run)


def test_evaluate_leaves_no_thread(run: Path) -> None:
    check_ranks_end_without_threads("torchrank.evaluate", "--run", str(run), cwd=run)


def test_a_process_may_make_one_group_after_another() -> None:
    for _ in range(3):
        with process_group("cpu", threads=1) as ranks:
            assert (ranks.rank, ranks.world_size, ranks.largest(7)) == (0, 1, 7)
            ranks.barrier()
        assert not dist.is_initialized()


FAILING = """
import tests.training.gloo_threads
import torch
from torchrank.training.distributed import process_group

def train():
    with process_group("cpu", threads=1) as ranks:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1), process_group=ranks.control)
        model(torch.ones(3, 2)).sum().backward()
        ranks.barrier()
        raise RuntimeError("on purpose")

train()
"""


def test_a_rank_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    done = run_module("failing", cwd=tmp_path, ranks=2)
    assert done.returncode == 1
    assert "RuntimeError: on purpose" in done.stderr
    assert "gloo threads left: 0" in done.stdout  # of the rank that torchrun did not stop first
    assert "gloo threads left: 2" not in done.stdout


FORKING = """
import os
from torchrank.training.distributed import process_group
with process_group("cpu", threads=1) as ranks:
    ranks.barrier()
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("the child has ended")
"""


def test_a_forked_child_ends(tmp_path: Path) -> None:
    (tmp_path / "forking.py").write_text(FORKING)
    done = run_module("forking", cwd=tmp_path)
    assert done.stdout.splitlines() == ["the child has ended"], done.stderr
