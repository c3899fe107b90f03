"""docs/cli.md pins every command, option, default and help line that a user meets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_docs_cli_is_what_help_says() -> None:
    script = ROOT / "scripts" / "cli_reference.py"
    result = subprocess.run([sys.executable, script, "--print"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == result.stdout, "run .venv/bin/python scripts/cli_reference.py"
