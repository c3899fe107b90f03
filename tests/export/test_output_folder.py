"""A bundle appears complete or not at all, and nothing that is not a bundle is ever replaced."""

from __future__ import annotations

import errno
import hashlib
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from export.build import ExportOptions, export_run
from export.bundle import read_manifest
from export.output_folder import bundle_folder, check_output
from tests.serving.bundle_factory import build_bundle
from torchrank.cli import cli
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    build_bundle(tmp_path / "bundle", version="old")
    return tmp_path / "bundle"


def write_new(folder: Path) -> None:
    (folder / "manifest.json").write_text("new")


def test_without_force_a_bundle_is_refused_and_with_it_replaced(old: Path) -> None:
    before = contents(old)
    with pytest.raises(ValueError, match=r"bundle exists: name another --output, or replace .* with --force"):
        check_output(old, force=False)
    with bundle_folder(old, force=True) as folder:
        write_new(folder)
        assert contents(old) == before  # until the new one is complete
    assert contents(old).keys() == {"manifest.json"}
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_a_failure_leaves_the_old_bundle_as_it_is(old: Path) -> None:
    before = contents(old)

    def fail() -> None:
        with bundle_folder(old, force=True) as folder:
            write_new(folder)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_an_export_killed_between_the_renames_has_lost_nothing(old: Path) -> None:
    before = contents(old)
    old.rename(old.with_name(".bundle.replaced"))
    with pytest.raises(ValueError, match="--force"), bundle_folder(old):
        pass
    assert contents(old) == before


def test_two_exports_to_one_output_do_not_mix(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with bundle_folder(output) as folder:
        write_new(folder)
        (tmp_path / "link").symlink_to(tmp_path)
        for name in (output, tmp_path / "link" / "bundle", tmp_path / "link" / ".." / tmp_path.name / "bundle"):
            with pytest.raises(ValueError, match=f"another export is writing {output}$"), bundle_folder(name):
                pytest.fail("a folder to write to")
        with bundle_folder(tmp_path / "other") as other:
            write_new(other)
        assert contents(folder).keys() == {"manifest.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "link", "other"]


def test_of_many_exports_at_once_one_writes(tmp_path: Path) -> None:
    """Each holds the lock for a moment only, so that many find a lock file that is about to go."""
    writing: list[int] = []

    def fail(number: int) -> str:
        try:
            with bundle_folder(tmp_path / "bundle") as folder:
                writing.append(number)
                assert (writing, list(folder.iterdir())) == ([number], [])
                write_new(folder)
                writing.remove(number)
                raise RuntimeError("half way")
        except (RuntimeError, ValueError) as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        reasons = set(pool.map(fail, range(400)))
    assert reasons - {f"another export is writing {tmp_path / 'bundle'}"} == {"half way"}
    with bundle_folder(tmp_path / "bundle") as folder:
        write_new(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_only_what_killed_exports_of_this_output_left_goes(tmp_path: Path) -> None:
    for name in (".bundle.partial-0123abcd", ".bundle.partial-mine", ".bundle2.partial-0123abcd"):
        (tmp_path / name).mkdir()
    (tmp_path / ".bundle.lock").touch()
    with bundle_folder(tmp_path / "bundle") as folder:
        write_new(folder)
    names = [".bundle.partial-mine", ".bundle2.partial-0123abcd", "bundle"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "bundle").stat().st_mode == tmp_path.joinpath(names[0]).stat().st_mode  # others may read it


@pytest.mark.parametrize("name", [".", "tables/..", "tables/../../bundle"])
def test_the_working_directory_may_be_the_output(name: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old)
    with pytest.raises(ValueError, match=f"^{old} exists: name another"), bundle_folder(Path(name)):
        pytest.fail("a folder to write to")
    with bundle_folder(Path(name), force=True) as folder:
        write_new(folder)
    assert contents(old).keys() == {"manifest.json"}
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def _file(path: Path) -> None:
    path.write_text("mine")


def _empty(path: Path) -> None:
    path.mkdir()


def _photographs(path: Path) -> None:
    path.mkdir()
    (path / "photograph.jpg").write_text("mine")


def _other_manifest(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"schema_version": 1, "name": "web extension"}')


def _bundle_with(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        build_bundle(path)
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("mine")

    return make


def _bundle_with_folder(path: Path) -> None:
    build_bundle(path)
    (path / "report.html").mkdir()


def _linked_tables(path: Path) -> None:
    build_bundle(path)
    (path / "tables").rename(path.with_name("elsewhere"))
    (path / "tables").symlink_to(path.with_name("elsewhere"))


def _link(path: Path) -> None:
    build_bundle(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_file, "is not a folder"),
        (_empty, "has no manifest of a bundle"),
        (_photographs, "has no manifest of a bundle"),
        (_other_manifest, "has a manifest that is not a bundle's"),
        (_bundle_with("notes.txt"), "holds 'notes.txt', which is not a bundle's"),
        (_bundle_with("mine.onnx"), "holds 'mine.onnx', which is not a bundle's"),
        (_bundle_with("tables/mine.pages"), "holds 'tables/mine.pages', which is not a bundle's"),
        (_bundle_with("tables/item_id.csv"), "holds 'tables/item_id.csv', which is not a bundle's"),
        (_bundle_with("more/item_id.pages"), "holds 'more', which is not a bundle's"),
        (_bundle_with_folder, "holds 'report.html', which is not a bundle's"),
        (_linked_tables, "holds 'tables', which is not a bundle's"),
        (_link, "is not a folder"),
    ],
)
def test_force_replaces_nothing_but_a_bundle(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "there")
    before = contents(tmp_path)
    message = f"there exists and {reason}: --force replaces a bundle and nothing else"
    with pytest.raises(ValueError, match=message), bundle_folder(tmp_path / "there", force=True):
        pytest.fail("a folder to write to")
    with pytest.raises(ValueError, match=f"there exists and {reason}: name another --output$"):
        check_output(tmp_path / "there", force=False)
    assert contents(tmp_path) == before


def test_all_that_an_export_may_have_written_is_replaced(old: Path) -> None:
    for name in ("report.html", "model.onnx.data", "tables/item_id.ids", "tables/item_id.counts"):
        (old / name).touch()
    check_output(old, force=True)


def test_a_bundle_of_an_older_schema_may_be_replaced(old: Path) -> None:
    manifest = old / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    check_output(old, force=True)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses the write, as it does where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [2_000, 30_000, 150_000])
def test_a_full_disk_leaves_nothing_behind(tiny_run: Path, old: Path, size: int) -> None:
    """In the middle of a table, of golden.jsonl, of model.onnx."""
    quiet_libraries()
    before = contents(old)
    with pytest.raises(OSError, match="nothing is written") as error, no_file_larger_than(size):
        export_run(Run(tiny_run), old, ExportOptions(force=True))
    assert error.value.errno == errno.EFBIG
    assert error.value.filename == str(old)
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_force_by_command(tiny_run: Path, old: Path) -> None:
    arguments = ["export", "--run", str(tiny_run), "--output", str(old), "--version", "new"]
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 1
    assert refused.output.startswith(f"Error: {old} exists: name another --output")
    assert read_manifest(old).version == "old"
    done = CliRunner().invoke(cli, [*arguments, "--force"])
    assert done.exit_code == 0, done.output
    assert read_manifest(old).version == "new"
