"""`torchrank export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--run", "run_dir", type=click.Path(path_type=Path), help="A run's directory; by default the latest run.")
@click.option("--output", type=click.Path(path_type=Path), help="The bundle to write; by default RUN/bundle.")
@click.option("--fp16", is_flag=True, help="Also write the dense graph in half precision.")
@click.option("--int8", is_flag=True, help="Also write the dense graph with matrix products in 8-bit integers.")
@click.option(
    "--force", is_flag=True, help="Replace a bundle that is at --output; write variants that are over their gate."
)
@click.option("--report", is_flag=True, help="Also write report.html: what passes and variants gained and cost.")
@click.option("--without", multiple=True, metavar="PASS", help="A graph pass to leave out; may be given again.")
@click.option(
    "--row-codec",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the embedding rows.",
)
@click.option("--model", help="Name of the release's model; by default DATA_MODEL.")
@click.option("--version", help="Name of the release's version; by default its time and configuration.")
def export(
    run_dir: Path | None,
    output: Path | None,
    fp16: bool,
    int8: bool,
    force: bool,
    report: bool,
    without: tuple[str, ...],
    row_codec: str,
    model: str | None,
    version: str | None,
) -> None:
    """Turn a run's best checkpoint into a bundle: ONNX graph, table pages, manifest, golden requests.

    Raw golden rows go through features, pages and ONNX Runtime and must give the trainer's scores; else nothing is
    written. A variant is written where it keeps the fp32 graph's AUC on the validation data, within 1e-4 (fp16) or 5e-4
    (int8).
    """
    from embedding_store.codec import check_codec
    from export.build import ExportOptions, export_run
    from torchrank.commands.training import find_own_modules
    from torchrank.training.quiet import quiet_libraries
    from torchrank.training.run import find_run

    find_own_modules()
    quiet_libraries()
    run = find_run(run_dir)
    target = output or run.folder / "bundle"
    options = ExportOptions(
        fp16=fp16,
        int8=int8,
        force=force,
        without=without,
        row_codec=check_codec(row_codec),
        model=model,
        version=version,
    )
    manifest = export_run(run, target, options, tell=lambda text: click.echo(text, err=True))
    sizes = ", ".join(f"{v.name} {v.bytes:,} bytes" for v in manifest.variants)
    click.echo(f"{target}: release {manifest.release}, graph {sizes}, {len(manifest.tables)} tables")
