"""Commands that use Slurm."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..errors import ArtifactError, ConfigError, ExternalError, format_command
from .app import RecipeArgument, RunArgument, RunDir, RunDirOption, SetOption, app, console, parse_path, say


@app.command()
def submit(
    recipe: RecipeArgument,
    run: RunDirOption,
    sets: SetOption = None,
    baseline: Annotated[bool, Option(help="Also train the same model end to end, at equal FLOPs.")] = False,
    partition: Annotated[str | None, Option(help="Same as --set slurm.partition=…")] = None,
    account: Annotated[str | None, Option(help="Same as --set slurm.account=…")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print commands and scripts; submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm: meta model, modules, fine-tuning. Run it again to submit missing phases."""
    from ..config import load_recipe

    given = [f"slurm.{key}={value}" for key, value in (("partition", partition), ("account", account)) if value]
    loaded = load_recipe(recipe, [*(sets or ()), *given])
    if dry_run:
        from ..launchers.slurm.client import DEFAULT_MAX_ARRAY_SIZE, query_max_array_size
        from ..launchers.slurm.sbatch import format_submission
        from ..planning.phases import make_plan

        size = DEFAULT_MAX_ARRAY_SIZE
        with contextlib.suppress(ExternalError):  # Slurm is not installed here
            size = query_max_array_size()
        say(format_submission(loaded, run, make_plan(loaded).modules, baseline=baseline, size=size))
        return
    from ..planning.context import open_run
    from ..planning.job_graph import build_job_graph
    from ..report.run_cost import describe_cost

    set_umask(loaded)
    opened = open_run(loaded, run, report=say)
    say(f"{loaded.name}: {describe_cost(run, build_job_graph(opened.rows, baseline=baseline))}")
    if baseline:
        run.log_event("baseline")
    submit_or_export(run)


@app.command()
def scripts(
    copy: Annotated[Path | None, Option(metavar="DIR", parser=parse_path, help="Copy them to DIR.")] = None,
) -> None:
    """Print the paths of the sbatch scripts, or copy them to a folder."""
    from ..config.resources import copy_scripts, resource_folder

    files = copy_scripts(copy) if copy else sorted(resource_folder("slurm").glob("*.sbatch"))
    say("\n".join(map(str, files)))


@app.command()
def resume(
    run: RunArgument, gate: Annotated[bool, Option("--gate", hidden=True, help="Set by gate jobs.")] = False
) -> None:
    """Submit the missing phases of a run to Slurm."""
    if not gate and run.load_recipe() and not (run.path / "jobs.json").exists():
        here, submit = (format_command(name, run.recipe_file, "--run-dir", run.path) for name in ("run", "submit"))
        raise ConfigError(
            f"{run.path} was never submitted to Slurm; resume it here with: {here}; or submit it with: {submit}"
        )
    submit_or_export(run, os.environ.get("SLURM_JOB_ID") if gate else None)


def submit_or_export(run: RunDir, gate: str | None = None) -> None:
    """Submit the missing phases of a run, or export its model if there are none."""
    from ..files import read_json_lines
    from ..interchange.export import export, is_complete_export
    from ..launchers.slurm.scheduler import submit_missing_jobs
    from ..planning.context import open_run
    from ..planning.job_graph import build_job_graph

    loaded = run.load_recipe()
    set_umask(loaded)
    opened = open_run(loaded, run)
    baseline = any(row["event"] == "baseline" for row in read_json_lines(run.path / "events.jsonl"))
    graph = build_job_graph(opened.rows, baseline=baseline)
    if not submit_missing_jobs(loaded, graph, run, gate=gate, say=say):
        say(f"watch:   {format_command('status', run.path, '--watch')}")
        return
    exported = run.path / "export"
    if not is_complete_export(exported):
        export(run.path, exported)
    from ..report.console_tables import summary_table

    console().print(summary_table(loaded.name, run.update_summary(), opened.rows))
    say(f"model:   {exported}")


def set_umask(recipe: Any) -> None:
    """Set the umask that the recipe specifies. Slurm passes it on to the jobs."""
    if recipe.slurm.umask is not None:
        os.umask(int(recipe.slurm.umask, 8))


@app.command(hidden=True)
def handle_job_exit(
    run: RunArgument,
    phase: Annotated[str, Option()],
    job: Annotated[str, Option()],
    code: Annotated[int, Option()],
    module: Annotated[int | None, Option()] = None,
) -> None:
    """Record the end of a Slurm job as done or failed, or requeue the job."""
    from ..config import PHASES
    from ..launchers.slurm import requeue

    if phase not in PHASES or (module is not None) != (phase == "incubate") or (module or 0) < 0:
        raise ConfigError(f"--phase {phase}: expected one of {', '.join(PHASES)}, and --module only for incubate")
    code, why = requeue.handle_job_exit(run.phase(phase, module), job, code)
    say(f"job {job}: {why}")
    raise SystemExit(code)


@app.command()
def cancel(run: RunArgument) -> None:
    """Cancel a run's Slurm jobs. Running phases write a checkpoint first; `resume` submits them again."""
    from ..launchers.slurm.client import cancel_jobs

    run.load_recipe()
    ids = cancel_jobs(run) if (run.path / "jobs.json").exists() else []
    say(f"canceled: {', '.join(ids)}" if ids else "this run has no jobs in the queue")


@app.command()
def logs(
    run: RunArgument,
    module: Annotated[int | None, Option(min=0, help="Only this module.")] = None,
    lines: Annotated[int, Option(min=1, help="Lines from the end of each log.")] = 20,
    follow: Annotated[bool, Option(help="Keep printing until Ctrl-C.")] = False,
) -> None:
    """Print the last lines of a run's logs, from Slurm jobs and local processes."""
    import subprocess

    from ..files import quote_path
    from ..launchers.slurm.client import list_job_logs

    modules = run.load_recipe().plan.number
    if module is not None and module >= modules:
        raise ConfigError(f"--module {module}: this run has modules 0 to {modules - 1}")
    pattern = f"modules/{module:02d}/logs/*.log" if module is not None else "**/logs/*.log"
    folders = ("meta", "modules", "finetune", "end_to_end")  # in the order of the pipeline
    local = [
        file for name in folders for file in sorted(run.path.glob(pattern)) if file.is_relative_to(run.path / name)
    ]
    files = [*local, *list_job_logs(run, module)]
    if not files:
        raise ArtifactError(
            f"no logs in {quote_path(run.path)} yet" + ("" if module is None else f" of module {module}")
        )
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(["tail", "-n", str(lines), *(["-F"] if follow else []), "--", *map(str, files)], check=False)
