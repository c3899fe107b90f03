"""Scores of a run's best checkpoint beside the columns of a data set, as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchrank.data.loader import Batch
from torchrank.data.source import Source
from torchrank.training.distributed import Ranks, process_group
from torchrank.training.load import load_run, scoring_device
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import find_run
from torchrank.training.targets import build_target

SCORE_PREFIX = "score_"  # a score may stand beside the label of its task


def predict(run_dir: Path | None, data: str, output: Path, keep: Sequence[str] | None) -> int:
    """Writes `output`, a Parquet file (a folder of one part a rank, under torchrun), and returns this rank's rows.

    keep: columns of the data to write beside the scores; None: all. The rows keep their order.
    """
    quiet_libraries()
    if output.exists():
        raise ValueError(f"{output} exists: name another --output, nothing is overwritten")
    run = find_run(run_dir)
    config = run.config()
    with process_group(scoring_device(config), config.training.threads) as ranks:
        loaded = load_run(run, ranks)
        source_config = loaded.source(data)
        source: Source = build_target("data", source_config)
        kept = tuple(source.column_names() if keep is None else keep)
        _check_names(kept, loaded.tasks)
        with _Writer(_part(output, ranks), loaded.tasks) as writer:
            loaded.scores(source_config, kept, writer.write)
        return writer.rows


def _check_names(kept: Sequence[str], tasks: Sequence[str]) -> None:
    taken = [f"{SCORE_PREFIX}{task}" for task in tasks if f"{SCORE_PREFIX}{task}" in kept]
    if taken:
        raise ValueError(f"the data has a column {taken[0]!r} already: name the columns to keep by --keep")


def _part(output: Path, ranks: Ranks) -> Path:
    if ranks.world_size == 1:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output
    ranks.barrier()  # every rank has seen that `output` did not exist
    output.mkdir(parents=True, exist_ok=True)
    return output / f"part-{ranks.rank:05d}.parquet"


class _Writer:
    """The file has its name only when it is complete."""

    def __init__(self, path: Path, tasks: tuple[str, ...]) -> None:
        self.rows = 0
        self._path, self._tasks = path, tasks
        self._partial = path.with_name(f".{path.name}.partial")
        self._file: pq.ParquetWriter | None = None

    def write(self, batch: Batch, scores: NDArray[np.float32]) -> None:
        columns: dict[str, Any] = dict(zip(batch.columns.schema.names, batch.columns.columns, strict=True))
        columns |= {f"{SCORE_PREFIX}{task}": scores[:, k] for k, task in enumerate(self._tasks)}
        table = pa.table(columns)
        if self._file is None:
            self._file = pq.ParquetWriter(self._partial, table.schema)
        self._file.write_table(table)
        self.rows += len(table)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None and self._file is not None:
            self._partial.rename(self._path)
        else:
            self._partial.unlink(missing_ok=True)


if __name__ == "__main__":
    from torchrank.commands.training import predict as command

    command()
