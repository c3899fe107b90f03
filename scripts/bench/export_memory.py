"""What a session takes at its peak, in a process of its own.

    python -m scripts.bench.export_memory GRAPH.onnx REQUEST.npz THREADS RUNS      (prints bytes)

From before the session is opened, with ONNX Runtime imported and the request in memory, to after the runs: weights,
their packed copies, what opening takes, and the arena.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from scripts.bench.export_sessions import Feed, in_onnx_runtime, open_session

# glibc otherwise moves this threshold as it goes, and the same file takes 38 or 44 MB, by the length of its path.
_FIXED = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


def peak_memory(
    files: dict[str, Path], feed: Feed, *, threads: int, runs: int = 50, processes: int = 3
) -> dict[str, float]:
    """Bytes by the graph's name; medians over processes in turn."""
    request = next(iter(files.values())).with_name("request.npz")
    np.savez(request, allow_pickle=False, **feed)
    found: dict[str, list[int]] = {name: [] for name in files}
    for _ in range(processes):
        for name, graph in files.items():
            command = [sys.executable, "-m", "scripts.bench.export_memory", graph, request, str(threads), str(runs)]
            ended = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
                env=os.environ | _FIXED,
            )
            found[name].append(int(ended.stdout))
    return {name: statistics.median(bytes_) for name, bytes_ in found.items()}


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def main() -> None:
    graph, request, threads, runs = sys.argv[1:]
    with np.load(request, allow_pickle=False) as arrays:
        feed = dict(arrays)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run = in_onnx_runtime(open_session(Path(graph), int(threads)), feed)
    for _ in range(int(runs)):
        run()
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main()
