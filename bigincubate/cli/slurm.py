"""Commands that use Slurm."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ArtifactError, ExternalError
from .app import RecipeArgument, RunArgument, RunDirOption, SetOption, app, console, say


@app.command()
def submit(
    recipe: RecipeArgument,
    run_dir: RunDirOption,
    sets: SetOption = None,
    baseline: Annotated[bool, typer.Option(help="Also train the same model end to end, at equal FLOPs.")] = False,
    partition: Annotated[str | None, typer.Option(help="As --set slurm.partition=…")] = None,
    account: Annotated[str | None, typer.Option(help="As --set slurm.account=…")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print commands and scripts; submit nothing.")] = False,
) -> None:
    """Submit a whole run to Slurm: meta model, array of modules, fine-tuning. Run again, it submits what is missing."""
    from ..config import load_recipe

    given = [f'slurm.{key}="{value}"' for key, value in (("partition", partition), ("account", account)) if value]
    loaded = load_recipe(recipe, [*(sets or ()), *given])
    from ..planning.context import open_run
    from ..storage.run_directory import RunDir

    directory = RunDir(run_dir)
    if dry_run:
        from ..launchers.slurm.client import DEFAULT_MAX_ARRAY_SIZE, query_max_array_size
        from ..launchers.slurm.sbatch import format_submission
        from ..planning.phases import make_plan

        size = DEFAULT_MAX_ARRAY_SIZE
        with contextlib.suppress(ExternalError):  # no Slurm here
            size = query_max_array_size()
        say(format_submission(loaded, directory, make_plan(loaded).modules, baseline=baseline, size=size))
        return
    set_umask(loaded)
    open_run(loaded, directory, report=say)
    if baseline:
        directory.log_event("baseline")
    submit_or_export(directory)


@app.command()
def scripts(
    copy: Annotated[Path | None, typer.Option(metavar="DIR", file_okay=False, help="Write them to DIR.")] = None,
) -> None:
    """Print where the sbatch scripts are; with --copy, write them to a folder to use or edit them."""
    from ..config.resources import copy_scripts, resource_folder

    files = copy_scripts(copy) if copy else sorted(resource_folder("slurm").glob("*.sbatch"))
    say("\n".join(map(str, files)))


@app.command()
def resume(
    run_dir: RunArgument,
    gate: Annotated[bool, typer.Option("--gate", hidden=True, help="Called by a gate.")] = False,
) -> None:
    """Submit the missing phases of a run to Slurm."""
    from ..storage.run_directory import RunDir

    submit_or_export(RunDir(run_dir), os.environ.get("SLURM_JOB_ID") if gate else None)


def submit_or_export(directory: Any, gate: str | None = None) -> None:
    """Submit the missing phases of a run; if there are none, export its model."""
    from ..files import read_json_lines
    from ..interchange.export import export as export_model
    from ..interchange.export import is_complete_export
    from ..launchers.slurm.scheduler import submit_missing_jobs
    from ..planning.context import open_run
    from ..planning.job_graph import build_job_graph

    loaded = directory.load_recipe()
    set_umask(loaded)
    opened = open_run(loaded, directory)
    baseline = any(row["event"] == "baseline" for row in read_json_lines(directory.path / "events.jsonl"))
    graph = build_job_graph(opened.rows, baseline=baseline)
    if not submit_missing_jobs(loaded, graph, directory, gate=gate, say=say):
        say(f"watch:   bigincubate status {directory.path} --watch")
        return
    exported = directory.path / "export"
    if not is_complete_export(exported):
        export_model(directory.path, exported)
    from ..report.console_tables import summary_table

    console().print(summary_table(loaded.name, directory.update_summary(), opened.rows))
    say(f"model:   {exported}")


def set_umask(recipe: Any) -> None:
    """Set the recipe's umask for the files of the run. Slurm passes it to the jobs."""
    if recipe.slurm.umask is not None:
        os.umask(int(recipe.slurm.umask, 8))


@app.command(hidden=True)
def handle_job_exit(
    run_dir: RunArgument,
    phase: Annotated[str, typer.Option()],
    job: Annotated[str, typer.Option()],
    code: Annotated[int, typer.Option()],
    module: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Handle the end of a Slurm job: done, requeued, or failed."""
    from typing import cast

    from ..config import Phase
    from ..launchers.slurm.requeue import handle_job_exit as handle
    from ..storage.run_directory import RunDir

    code, why = handle(RunDir(run_dir).phase(cast("Phase", phase), module), job, code)
    say(f"job {job}: {why}")
    raise typer.Exit(code)


@app.command()
def cancel(run_dir: RunArgument) -> None:
    """Cancel a run's Slurm jobs. Running phases write a checkpoint first; `resume` submits them again."""
    from ..launchers.slurm.client import cancel_jobs
    from ..storage.run_directory import RunDir

    directory = RunDir(run_dir)
    directory.load_recipe()
    ids = cancel_jobs(directory)
    say(f"cancelled: {', '.join(ids)}" if ids else "nothing of this run is in the queue")


@app.command()
def logs(
    run_dir: RunArgument,
    module: Annotated[int | None, typer.Option(min=0, help="Only this module.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="Lines from the end of each log.")] = 20,
    follow: Annotated[bool, typer.Option(help="Keep printing until Ctrl-C.")] = False,
) -> None:
    """Print the last lines of a run's logs, of Slurm jobs and of local processes."""
    import subprocess

    from ..launchers.slurm.client import list_job_logs
    from ..storage.run_directory import RunDir

    pattern = f"modules/{module:02d}/logs/*.log" if module is not None else "**/logs/*.log"
    files = sorted(run_dir.glob(pattern)) + list_job_logs(RunDir(run_dir), module)
    if not files:
        raise ArtifactError(f"no logs in {run_dir} yet")
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(["tail", "-n", str(lines), *(["-F"] if follow else []), *map(str, files)], check=False)
