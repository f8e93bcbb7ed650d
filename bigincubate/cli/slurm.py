"""Commands that use Slurm."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..errors import (
    ArtifactError,
    ConfigError,
    ExternalError,
    SystemResourceError,
    format_command,
)
from .app import (
    MethodOption,
    RecipeArgument,
    RunArgument,
    RunDir,
    RunDirOption,
    SetOption,
    add_method,
    app,
    check_method,
    console,
    parse_path,
    say,
)

# keys that submit takes from the variables of sbatch if the recipe leaves them open
SHELL_DEFAULTS = {
    "slurm.account": "SBATCH_ACCOUNT",
    "slurm.partition": "SBATCH_PARTITION",
    "slurm.qos": "SBATCH_QOS",
    "slurm.constraint": "SBATCH_CONSTRAINT",
    "slurm.time": "SBATCH_TIMELIMIT",
}


@app.command()
def submit(
    recipe: RecipeArgument,
    run: RunDirOption,
    sets: SetOption = None,
    method: MethodOption = None,
    baseline: Annotated[bool, Option(help="Also train the same model end to end, at equal FLOPs.")] = False,
    partition: Annotated[str | None, Option(help="Same as --set slurm.partition=…")] = None,
    account: Annotated[str | None, Option(help="Same as --set slurm.account=…")] = None,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Print commands, scripts and the result of `sbatch --test-only`; submit nothing."),
    ] = False,
    prepare_only: Annotated[
        bool,
        Option(
            "--prepare-only",
            help="Prepare data and plan, do not submit; `resume` submits later without torch.",
        ),
    ] = False,
) -> None:
    """Submit a run to Slurm: meta model, modules, fine-tuning. Run it again to submit missing phases."""
    from ..config import load_recipe

    given = add_method(sets, method)
    given += [f"slurm.{key}={value}" for key, value in (("partition", partition), ("account", account)) if value]
    loaded = load_recipe(recipe, given)
    check_method(method, loaded)
    if defaults := shell_defaults(loaded):
        loaded = load_recipe(recipe, [*given, *defaults])
    if dry_run:
        preview_submission(loaded, run, baseline=baseline)
        return
    from ..planning.context import open_run
    from ..planning.job_graph import build_job_graph
    from ..report.run_cost import describe_cost

    set_umask(loaded)
    for default in defaults:
        say(f"{default}, from the environment variable {SHELL_DEFAULTS[default.partition('=')[0]]}")
    opened = open_run(loaded, run, report=say)
    say(f"{loaded.name}: {describe_cost(run, build_job_graph(opened.rows, baseline=baseline))}")
    if baseline:
        run.log_event("baseline")
    if prepare_only:
        from ..launchers.slurm.submission_log import SubmissionLog

        if not (run.path / "jobs.json").exists():
            SubmissionLog(run).write()
        say(f"submit it with: {format_command('resume', run.path)}")
        return
    submit_or_export(run)


def shell_defaults(recipe: Any) -> list[str]:
    """Return ``KEY=VALUE`` for keys that the recipe leaves open and for which the shell has a variable of sbatch.

    They become part of the recipe of the run: the jobs that submit its later phases do not have these variables.
    """
    found = {key: os.environ.get(variable) for key, variable in SHELL_DEFAULTS.items()}
    return [
        f"{key}={value}" for key, value in found.items() if value and not getattr(recipe.slurm, key.partition(".")[2])
    ]


def preview_submission(recipe: Any, run: RunDir, *, baseline: bool) -> None:
    """Print the commands and scripts of a run, and what Slurm answers to ``sbatch --test-only`` where it is installed.

    Raises:
        SystemResourceError: Slurm would refuse a job.
    """
    from ..launchers.slurm.client import DEFAULT_MAX_ARRAY_SIZE, query_max_array_size, test_submission
    from ..launchers.slurm.sbatch import format_submission, plan_submission
    from ..planning.phases import make_plan

    size, reachable = DEFAULT_MAX_ARRAY_SIZE, False
    with contextlib.suppress(ExternalError):  # Slurm is not installed here
        size, reachable = query_max_array_size(), True
    modules = make_plan(recipe).incubated
    say(format_submission(recipe, run, modules, baseline=baseline, size=size))
    refused = []
    for kind, command in plan_submission(recipe, run, modules, baseline=baseline, size=size) if reachable else ():
        try:
            say(f"sbatch --test-only, {kind}: {test_submission(command)}")
        except ExternalError as error:
            refused.append(f"{kind}: {error}")
    if refused:
        raise SystemResourceError(f"Slurm would refuse {'; '.join(refused)}")


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
    """Submit the missing phases of a run to Slurm, or export the model if all are done.

    Phases that are done or in the queue are skipped, and the numbers of submissions are reset.
    """
    from ..launchers.slurm.job_logs import write_gate_trace

    if not gate and run.load_recipe() and not (run.path / "jobs.json").exists():
        here, submit = (format_command(name, run.recipe_file, "--run-dir", run.path) for name in ("run", "submit"))
        raise ConfigError(
            f"{run.path} was never submitted to Slurm; resume it here with: {here}; or submit it with: {submit}"
        )
    job = os.environ.get("SLURM_JOB_ID") if gate else None
    try:
        submit_or_export(run, job)
    except Exception as error:
        if job:
            write_gate_trace(run, job, str(error))
        raise


def submit_or_export(run: RunDir, gate: str | None = None) -> None:
    """Submit the missing phases of a run, or export its model if there are none.

    Needs no torch if the plan exists and no model is exported here: with a container, this runs outside of it.

    Args:
        run: The run directory.
        gate: Id of this job if it is a gate.
    """
    from ..launchers.slurm.scheduler import submit_missing_jobs
    from ..planning.job_graph import build_job_graph
    from ..planning.planned_row import stored_rows
    from ..storage.run_directory import is_complete_export

    loaded = run.load_recipe()
    set_umask(loaded)
    rows = stored_rows(run, loaded)
    if rows is None:
        from ..planning.context import open_run

        rows = open_run(loaded, run).rows
    baseline = any(row["event"] == "baseline" for row in run.read_events())
    graph = build_job_graph(rows, baseline=baseline)
    if not submit_missing_jobs(loaded, graph, run, gate=gate, say=say):
        say(f"watch:   {format_command('status', run.path, '--watch')}")
        return
    if not is_complete_export(run.exported):
        export_model(loaded, run, in_job=gate is not None)
    from ..report.console_tables import summary_table

    console().print(summary_table(loaded.name, run.update_summary(), rows))
    say(f"model:   {run.exported}")


def export_model(recipe: Any, run: RunDir, *, in_job: bool) -> None:
    """Export the model of a run that is done, in the container of the ranks if there is one.

    Args:
        recipe: The recipe of the run.
        run: The run directory.
        in_job: Whether this is a job of Slurm, in which srun starts no other job.

    Raises:
        SystemResourceError: The command in the container failed.
    """
    import shlex
    import subprocess
    import sys

    slurm = recipe.slurm
    if not slurm.in_container:
        from ..report.model_card import export_with_card

        export_with_card(run.path, run.exported)
        return
    by_hand = format_command("export", run.path, "--out", run.exported)
    if slurm.container is None and not in_job:  # the container exists only within a job
        raise SystemResourceError(f"all phases are done; export the model in the container: {by_hand}")
    prefix = ["srun", "--ntasks=1", *slurm.srun] if slurm.srun and in_job else []
    prefix += shlex.split(slurm.container or "")
    command = [slurm.python or sys.executable, "-m", "bigincubate", "export", str(run.path), "--out", str(run.exported)]
    if subprocess.run([*prefix, *command], check=False).returncode:
        raise SystemResourceError(f"the export failed, see above; run it in the container: {by_hand}")


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
    from ..launchers.slurm.submission_log import cancel_jobs

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
    from ..launchers.slurm.job_logs import list_job_logs

    recipe = run.load_recipe()
    if module is not None and module >= recipe.plan.number:
        raise ConfigError(f"--module {module}: this run has modules 0 to {recipe.plan.number - 1}")
    pattern = f"modules/{module:02d}/logs/*.log" if module is not None else "**/logs/*.log"
    folders = ("meta", "modules", "finetune", "end_to_end")  # in the order of the pipeline
    local = [
        file for name in folders for file in sorted(run.path.glob(pattern)) if file.is_relative_to(run.path / name)
    ]
    files = [*local, *list_job_logs(run, module)]
    if not files:
        if module is not None and module not in recipe.incubated:
            reason = "finetune.init" if recipe.finetune.init else "plan.incubate"
            raise ConfigError(f"--module {module} is not incubated ({reason}), so it has no logs")
        raise ArtifactError(
            f"no logs in {quote_path(run.path)} yet" + ("" if module is None else f" of module {module}")
        )
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(["tail", "-n", str(lines), *(["-F"] if follow else []), "--", *map(str, files)], check=False)
