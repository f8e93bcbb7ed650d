"""Commands that write reports of runs and compare runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..errors import SystemResourceError, describe_solution
from .app import JsonOption, RunArgument, RunsArgument, app, console, parse_path, say, say_json


@app.command()
def report(
    run: RunArgument,
    out: Annotated[
        Path | None, Option(metavar="FILE", parser=parse_path, help="The page to write (default: DIR/report.html).")
    ] = None,
) -> None:
    """Write a report of a finished or unfinished run as one HTML file: scores, curves, costs, interruptions."""
    from ..files import write_text
    from ..report.accounting import query_usage
    from ..report.page import render_report
    from ..report.run_data import read_run
    from ..report.verify import verify_run

    file = out or run.path / "report.html"
    page = render_report(read_run(run), list(verify_run(run, everything=False)), query_usage(run))
    try:
        write_text(file, page)
    except OSError as error:
        other = "write it to another place with --out FILE"
        solutions = ", or ".join(filter(None, [describe_solution(error), other if out is None else ""]))
        raise SystemResourceError("; ".join(filter(None, [f"{file}: {error.strerror}", solutions]))) from None
    say(str(file))


@app.command()
def compare(
    runs: RunsArgument,
    out: Annotated[
        Path | None,
        Option(metavar="FOLDER", parser=parse_path, help="Also write compare.html and figures to this folder."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: scores of each phase, and costs in epochs, samples, FLOPs and seconds."""
    from ..report.compare import compare_json, label_routes, write_comparison
    from ..report.console_tables import compare_table
    from ..report.run_data import read_run

    routes = label_routes([read_run(run) for run in runs])
    if as_json:
        say_json(compare_json(routes))
    else:
        console().print(compare_table(routes))
    if out is not None:
        written = write_comparison(routes, out)
        if not as_json:
            say("\n".join(map(str, written)))
