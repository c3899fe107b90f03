"""Runs a module as `python -m` would, and says how many of gloo's threads are left where the interpreter's end begins.

python -m tests.training.gloo_threads MODULE ARGUMENTS…
"""

from __future__ import annotations

import atexit
import runpy
import sys
from pathlib import Path


@atexit.register  # before any of torchrank's, so it is called after them
def _report() -> None:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"gloo threads left: {names.count('pt_gloo_runloop')}", flush=True)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
