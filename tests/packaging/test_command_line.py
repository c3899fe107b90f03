"""The `torchrank` command itself: what it costs to start, and what it does with errors."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

import torchrank
from embedding_store.errors import StoreUnavailable, UnknownRelease
from torchrank.cli import COMMANDS, Entry, cli
from torchrank.config_dir import config_dir

TORCHRANK = str(Path(sys.executable).with_name("torchrank"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_answers_within_half_a_second() -> None:
    times = []
    for _ in range(5):  # the quickest of a few, since others may use this machine
        start = time.perf_counter()
        result = run(TORCHRANK, "--help")
        times.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
    assert min(times) < 0.5, times


def test_help_imports_no_command() -> None:
    listing = "import sys; from torchrank.cli import cli; cli(['--help'], standalone_mode=False); print(*sys.modules)"
    result = run(sys.executable, "-c", listing)
    assert result.returncode == 0, result.stderr
    *help_lines, modules = result.stdout.splitlines()
    loaded = {name.partition(".")[0] for name in modules.split()}
    assert not loaded & {"numpy", "numba", "torch", "pyarrow", "rich", "embedding_store", "export"}
    assert not [name for name in modules.split() if name.startswith("torchrank.commands.")]
    for name, entry in COMMANDS.items():
        assert any(line.split() == [name, *entry.summary.split()] for line in help_lines), name


@pytest.mark.parametrize("command", [[TORCHRANK], [sys.executable, "-m", "torchrank.cli"]], ids=["script", "module"])
def test_version(command: list[str]) -> None:
    result = run(*command, "--version")
    assert (result.returncode, result.stdout) == (0, f"torchrank, version {torchrank.__version__}\n")


COMMAND_FILES = sorted((Path(torchrank.__file__).parent / "commands").glob("*.py"))


@pytest.mark.parametrize("source", COMMAND_FILES, ids=lambda path: path.stem)
def test_command_modules_import_only_click_the_standard_library_and_each_other(source: Path) -> None:
    allowed = {"click", *sys.stdlib_module_names}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            sibling = module.startswith("torchrank.commands.")
            assert sibling or module.partition(".")[0] in allowed, ast.unparse(node)


def test_every_command_is_in_one_of_these_files() -> None:
    modules = {f"torchrank.commands.{source.stem}" for source in COMMAND_FILES}
    assert {entry.module for entry in COMMANDS.values()} <= modules


@pytest.mark.parametrize("name", COMMANDS)
def test_every_entry_names_a_command(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)
    assert command.help, f"{name} has no help"


def test_conf_is_beside_the_package_in_a_checkout() -> None:
    assert config_dir() == Path(torchrank.__file__).resolve().parent.parent / "conf"
    assert config_dir().is_dir()


def missing_file() -> None:
    Path("/nonexistent/day.parquet").read_bytes()


def missing_package() -> None:
    import not_installed_here.deep  # noqa: F401 # its absence is the case


def missing_module_of_ours() -> None:
    import torchrank.no_such_module  # noqa: F401 # its absence is the case


def raising(error: Exception) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


USERS = {
    "value": (raising(ValueError("column 'age': not a number")), "Error: column 'age': not a number\n"),
    "store": (raising(StoreUnavailable("memmap:///d: gone")), "Error: memmap:///d: gone\n"),
    "lookup": (raising(UnknownRelease("no release m@1")), "Error: no release m@1\n"),
    "file": (click.command(missing_file), "Error: /nonexistent/day.parquet: No such file or directory\n"),
    "connection": (raising(ConnectionRefusedError("port 80: refused")), "Error: port 80: refused\n"),
    "extra": (
        click.command(missing_package),
        "Error: this command needs not_installed_here, which is not installed: "
        "install torchrank[train] or torchrank[serve]\n",
    ),
}
OURS = {
    "key": (raising(KeyError("age")), KeyError),
    "type": (raising(TypeError("not callable")), TypeError),
    "assertion": (raising(AssertionError("rows")), AssertionError),
    "module": (click.command(missing_module_of_ours), ModuleNotFoundError),
}


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[click.Command], None]:
    """Makes a click command `torchrank probe`."""

    def put(command: click.Command) -> None:
        module = ModuleType("probe_command")
        monkeypatch.setattr(module, "probe", command, raising=False)
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(COMMANDS, "probe", Entry("probe_command", "probe", "Raises."))

    return put


@pytest.mark.parametrize(("command", "line"), USERS.values(), ids=USERS)
def test_what_the_user_can_mend_is_one_line(
    register: Callable[[click.Command], None], command: click.Command, line: str
) -> None:
    register(command)
    result = CliRunner().invoke(cli, ["probe"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)


@pytest.mark.parametrize(("command", "line"), USERS.values(), ids=USERS)
def test_debug_keeps_the_traceback(
    register: Callable[[click.Command], None], command: click.Command, line: str
) -> None:
    register(command)
    result = CliRunner().invoke(cli, ["--debug", "probe"])
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(("command", "kind"), OURS.values(), ids=OURS)
def test_a_bug_keeps_its_traceback(
    register: Callable[[click.Command], None], command: click.Command, kind: type[Exception]
) -> None:
    register(command)
    result = CliRunner().invoke(cli, ["probe"])
    assert isinstance(result.exception, kind)


def test_ctrl_c_exits_130_quietly(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(
        "import click, time\n@click.command()\ndef wait():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    program = (
        "from torchrank import cli\n"
        "cli.COMMANDS['wait'] = cli.Entry('waiting', 'wait', 'Sleeps.')\n"
        "cli.cli.main(['wait'], prog_name='torchrank')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (130, "")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    program = (
        "from torchrank import cli\n"
        "cli.COMMANDS['many'] = cli.Entry('counting', 'many', 'Prints.')\n"
        "cli.cli.main(['many'], prog_name='torchrank')\n"
    )
    (tmp_path / "counting.py").write_text(
        "import click\n@click.command()\ndef many():\n    for n in range(100_000):\n        click.echo(n)\n"
    )
    pipe = f'{sys.executable} -c "$0" | head -n 1'
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(["sh", "-c", pipe, program], capture_output=True, text=True, env=environment, check=False)
    assert (result.stdout, result.stderr) == ("0\n", "")
