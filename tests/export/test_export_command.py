"""What the user types reaches the export, option by option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import export.build
from export.build import ExportOptions
from tests.serving.bundle_factory import build_bundle
from torchrank.cli import cli

OPTIONS: list[tuple[list[str], ExportOptions]] = [
    ([], ExportOptions()),
    (["--fp16"], ExportOptions(fp16=True)),
    (["--int8"], ExportOptions(int8=True)),
    (["--force"], ExportOptions(force=True)),
    (["--report"], ExportOptions(report=True)),
    (["--without", "fold", "--without", "user_rows"], ExportOptions(without=("fold", "user_rows"))),
    (["--row-codec", "int8"], ExportOptions(row_codec="int8")),
    (["--model", "feed", "--version", "7"], ExportOptions(model="feed", version="7")),
]


@pytest.mark.parametrize(("typed", "wanted"), OPTIONS)
def test_every_option_reaches_the_export(
    typed: list[str], wanted: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_bundle(tmp_path / "any").manifest
    given: list[Any] = []

    def record(run: Any, output: Path, options: ExportOptions, tell: Any) -> Any:
        given.extend([run.folder, output, options])
        return manifest

    monkeypatch.setattr(export.build, "export_run", record)
    (tmp_path / "config.yaml").touch()
    result = CliRunner().invoke(cli, ["export", "--run", str(tmp_path), "--output", "there", *typed])
    assert result.exit_code == 0, result.output
    assert given == [tmp_path, Path("there"), wanted]
