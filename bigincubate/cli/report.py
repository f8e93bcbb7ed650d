"""Commands that report on runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, RunArgument, app, console, say


@app.command()
def report(
    run_dir: RunArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page to write [default: DIR/report.html].")
    ] = None,
) -> None:
    """Write a report of a run, finished or not, as one HTML file: scores, curves, costs, interruptions."""
    from ..files import write_text
    from ..report.page import render_report
    from ..report.run_data import read_run
    from ..report.verify import verify_run
    from ..storage.run_directory import RunDir

    directory, file = RunDir(run_dir), out or run_dir / "report.html"
    run_data = read_run(directory)
    write_text(file, render_report(run_data, list(verify_run(directory, everything=False))))
    say(str(file))


@app.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also draw: compare.html and pictures, in this folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: scores of each phase, and their cost in epochs, samples, FLOPs and seconds."""
    from ..report.compare import compare_json, label_routes
    from ..report.console_tables import compare_table
    from ..report.run_data import read_run
    from ..storage.run_directory import RunDir

    routes = label_routes([read_run(RunDir(folder)) for folder in run_dirs])
    if as_json:
        print(json.dumps(compare_json(routes), indent=1))
    else:
        console().print(compare_table(routes))
    if out is not None:
        from ..report.compare import write_comparison

        written = write_comparison(routes, out)
        if not as_json:
            say("\n".join(map(str, written)))
