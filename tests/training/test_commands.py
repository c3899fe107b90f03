"""`torchrank evaluate` and `predict` as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from sklearn import metrics as sk

from tests.tiny import run_module
from torchrank.cli import cli

TASKS = ("click", "finish")


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: evaluate writes into it."""
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("commands") / "run"))


@pytest.fixture(scope="module")
def predicted(run: Path, tiny_data: Path) -> Path:
    output = run.parent / "new folder" / "scores.parquet"
    arguments = ("predict", "--run", str(run), "--data", str(tiny_data / "valid.parquet"), "--output", str(output))
    done = run_module("torchrank.cli", *arguments, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert f"{output}: 1,500 rows" in done.stderr
    return output


@pytest.fixture(scope="module")
def evaluated(run: Path) -> dict[str, dict[str, float]]:
    done = run_module("torchrank.cli", "evaluate", "--run", str(run), "--json", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((run / "evaluation.json").read_text()) == found
    return found


def test_predict_keeps_columns_and_order(predicted: Path, tiny_data: Path) -> None:
    given, written = pq.read_table(tiny_data / "valid.parquet"), pq.read_table(predicted)
    assert written.column_names == [*given.column_names, "score_click", "score_finish"]
    for name in ("request_id", "user_id", "history", "item_id", "click", "finish"):
        assert written[name].to_pylist() == given[name].to_pylist()
    np.testing.assert_allclose(written["price"], given["price"])
    for task in TASKS:
        scores = written[f"score_{task}"].to_numpy()
        assert scores.dtype == np.float32
        assert ((scores > 0) & (scores < 1)).all()
        assert len(np.unique(scores)) > 1000
    assert not list(predicted.parent.glob(".*"))  # no partial file


def test_evaluate_is_scikit_learn_on_what_predict_gave(predicted: Path, evaluated: dict[str, dict[str, float]]) -> None:
    table = pq.read_table(predicted)
    users = np.array(table["user_id"].to_pylist())
    assert tuple(evaluated) == TASKS
    for task, values in evaluated.items():
        labels, scores = table[task].to_numpy(), table[f"score_{task}"].to_numpy().astype(np.float64)
        assert set(values) == {"auc", "logloss", "calibration", "gauc"}
        assert values["auc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-6)
        assert values["logloss"] == pytest.approx(sk.log_loss(labels, scores), abs=1e-6)
        assert values["calibration"] == pytest.approx(scores.sum() / labels.sum(), abs=1e-5)
        total, rows = 0.0, 0
        for user in np.unique(users):
            of = users == user
            if len(np.unique(labels[of])) == 2:
                total += of.sum() * sk.roc_auc_score(labels[of], scores[of])
                rows += of.sum()
        assert values["gauc"] == pytest.approx(total / rows, abs=1e-6)
    assert evaluated["click"]["auc"] > 0.52  # it has learnt something


def test_two_ranks_measure_what_one_does(run: Path, evaluated: dict[str, dict[str, float]]) -> None:
    """The run was trained on one rank; two share its tables now."""
    done = run_module("torchrank.evaluate", "--run", str(run), "--json", cwd=run.parent, ranks=2)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # one rank prints
    for task, values in json.loads(line).items():
        assert values == pytest.approx(evaluated[task], abs=2e-6)


def test_two_ranks_predict_what_one_does(run: Path, predicted: Path, tiny_data: Path) -> None:
    output = run.parent / "parts"
    arguments = ("--run", str(run), "--data", str(tiny_data / "valid.parquet"), "--output", str(output))
    done = run_module("torchrank.predict", *arguments, "--keep", "item_id", cwd=run.parent, ranks=2)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    parts, whole = pq.read_table(output), pq.read_table(predicted)
    assert parts.column_names == ["item_id", "score_click", "score_finish"]
    assert parts["item_id"].to_pylist() == whole["item_id"].to_pylist()
    for task in TASKS:
        np.testing.assert_allclose(parts[f"score_{task}"], whole[f"score_{task}"], atol=1e-6, rtol=0)


def test_predict_needs_no_labels(run: Path, predicted: Path, tiny_data: Path, tmp_path: Path) -> None:
    rows = pq.read_table(tiny_data / "valid.parquet").drop_columns(["click", "finish"])
    pq.write_table(rows, tmp_path / "unlabelled.parquet")
    output = tmp_path / "scores.parquet"
    arguments = ["--run", str(run), "--data", str(tmp_path / "unlabelled.parquet"), "--output", str(output)]
    result = CliRunner().invoke(cli, ["predict", *arguments, "--keep", "user_id", "--keep", "hour"])
    assert result.exit_code == 0, result.output
    written = pq.read_table(output)
    assert written.column_names == ["user_id", "hour", "score_click", "score_finish"]
    np.testing.assert_allclose(written["score_click"], pq.read_table(predicted)["score_click"], atol=1e-6, rtol=0)


def test_the_latest_run_is_the_default(
    run: Path, evaluated: dict[str, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "latest_run").write_text(f"{run}\n")
    result = CliRunner().invoke(cli, ["evaluate"])
    assert result.exit_code == 0, result.output
    header, *rows = [line for line in result.output.splitlines() if set("│┃") & set(line)]
    assert [word for word in header.split() if word.isalpha()] == ["task", "auc", "logloss", "calibration", "gauc"]
    assert [f"{evaluated[task]['auc']:.4f}" in row for task, row in zip(TASKS, rows, strict=True)] == [True, True]


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (None, "Error: there is no latest run here: train one (python -m torchrank.train +model=mmoe)"),
        ("nothing", "nothing is not a run: it has no config.yaml"),
        ("no checkpoint", "has no checkpoint yet"),
    ],
)
def test_what_is_no_run_is_one_line(
    command: str, folder: str | None, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no checkpoint").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "no checkpoint")
    arguments = [command, *([] if folder is None else ["--run", folder])]
    if command == "predict":
        arguments += ["--data", "data.parquet", "--output", "scores.parquet"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_errors_of_data_and_output_are_one_line(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    data, output = str(tiny_data / "valid.parquet"), tmp_path / "scores.parquet"

    def predict(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["predict", "--run", str(run), *arguments])
        assert result.exit_code == 1, result.output
        (line,) = result.output.splitlines()
        return line

    assert "no-such-file" in predict("--data", str(tmp_path / "no-such-file"), "--output", str(output))
    assert "'itme_id'" in predict("--data", data, "--output", str(output), "--keep", "itme_id").replace('"', "'")
    assert list(tmp_path.iterdir()) == []  # nothing is begun
    output.write_bytes(b"precious")
    assert "exists: name another --output, nothing is overwritten" in predict("--data", data, "--output", str(output))
    assert output.read_bytes() == b"precious"


def test_scores_of_an_earlier_prediction_are_not_overwritten_in_silence(
    run: Path, predicted: Path, tmp_path: Path
) -> None:
    arguments = ["predict", "--run", str(run), "--data", str(predicted), "--output", str(tmp_path / "scores.parquet")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert "the data has a column 'score_click' already: name the columns to keep by --keep" in result.output
    assert list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(cli, [*arguments, "--keep", "item_id"]).exit_code == 0


def test_a_run_trained_on_cuda_is_evaluated_anywhere(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    text = (copy / "config.yaml").read_text()
    assert "\ndevice: auto\n" in text
    (copy / "config.yaml").write_text(text.replace("\ndevice: auto\n", "\ndevice: cuda\n"))
    result = CliRunner().invoke(cli, ["evaluate", "--run", str(copy), "--json"])
    assert result.exit_code == 0, result.output
