"""Commands that train, and the command that predicts what training costs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from contextlib import closing
from dataclasses import asdict
from typing import Annotated

from typer import Option

from ..distributed.rank_logging import LEVEL_VARIABLE, setup_logging
from ..errors import ConfigError, Exit
from .app import (
    JsonOption,
    LogLevelOption,
    RecipeArgument,
    RunDirOption,
    SetOption,
    app,
    console,
    fail,
    say,
    say_json,
)


@app.command()
def plan(
    recipe: RecipeArgument,
    sets: SetOption = None,
    world: Annotated[
        str | None, Option(metavar="N,N,…", help="Numbers of ranks to plan for [default: 1, 2 and 8].")
    ] = None,
    cluster: Annotated[
        str | None,
        Option(
            metavar="nodes=N,gpus=N,tflops=X",
            help="How long it takes there, at X TFLOP/s a GPU; or with rates=RUN at what the phases of a run achieved.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each phase costs: depths, parameters, FLOPs, memory, communication. Needs no data.

    Memory and communication are those of one rank, under each sharding strategy.
    """
    from ..config import load_recipe

    loaded = load_recipe(recipe, sets or ())
    if world is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", world):
        raise ConfigError(f"--world {world}: expected numbers of ranks, such as 1,2,8")
    from ..planning.cost import cost_plan, plan_json
    from ..planning.memory import all_batches_divisible, batch_divisible, estimate_footprints
    from ..planning.phases import make_plan
    from ..planning.prepare_run import expected_samples

    defaults = [n for n in (1, 2, 8) if all_batches_divisible(loaded, n)]
    worlds = [int(ranks) for ranks in world.split(",")] if world else defaults
    cut = make_plan(loaded)
    rows = cost_plan(loaded, cut, expected_samples(loaded))
    counted = plan_json(loaded, cut, rows)
    spread = estimate_footprints(loaded, cut, rows, worlds)
    for row in counted["rows"]:
        row["sharding"] = [asdict(each) for each in spread[row["key"]]]
    if cluster is not None:
        from ..planning.walltime import critical_path_seconds, estimate_walltime, parse_cluster

        there = parse_cluster(cluster)
        estimates = estimate_walltime(
            rows, there, lambda row, ranks: batch_divisible(loaded.settings(row.phase), ranks)
        )
        counted["cluster"] = {
            "gpus": there.gpus,
            "phases": [asdict(each) for each in estimates],
            "seconds": critical_path_seconds(estimates, there.gpus),
            "gpu_seconds": sum(each.gpus * each.seconds for each in estimates if each.key != "end_to_end"),
        }
    if as_json:
        say_json(counted)
        return
    from ..report.console_tables import cluster_table, plan_table, sharding_tables

    for table in (plan_table(counted), *sharding_tables(counted)):
        console().print(table, "")
    own, baseline = counted["incubation_flops"], counted["end_to_end_flops"]
    ratio = f"{own / baseline:.3f} times" if baseline else "no"
    say(
        f"incubation: {own / 1e15:.4g} PFLOPs in all, {100 * counted['finetune_share']:.1f}% of them fine-tuning;"
        f" {ratio} end-to-end training's {baseline / 1e15:.4g}"
    )
    if cluster is not None:
        console().print("", cluster_table(counted["cluster"]))


@app.command()
def run(
    recipe: RecipeArgument,
    directory: RunDirOption,
    jobs: Annotated[
        int | None,
        Option(min=1, help="Phases that run at the same time; as many as cores, or as --co-train needs."),
    ] = None,
    nproc: Annotated[int, Option(min=1, help="Ranks that train each phase together.")] = 1,
    sets: SetOption = None,
    baseline: Annotated[bool, Option(help="Also train the same model end to end, at equal FLOPs.")] = False,
    small: Annotated[bool, Option("--smoke", help="The recipe made small, on made-up data: two minutes.")] = False,
    co_train: Annotated[
        bool, Option("--co-train", help="All modules at the same time, from one loader; the same results.")
    ] = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Run all phases on this machine: meta model, modules, assembly, fine-tuning, export. Run again, it resumes."""
    from ..config import load_recipe
    from ..planning.smoke import smoke

    loaded = load_recipe(recipe, sets or (), smoke if small else None)
    os.environ[LEVEL_VARIABLE] = log_level  # for the processes of the phases
    setup_logging(log_level)
    if co_train:
        from ..experimental.shared_loader.launch import count_parallel_jobs, shared_loader_job

        jobs = count_parallel_jobs(loaded, jobs, baseline)
    from ..interchange.export import export, is_complete_export
    from ..launchers.local import LocalRunner
    from ..launchers.progress import ProgressReporter
    from ..planning.context import open_run
    from ..planning.job_graph import build_job_graph

    exported = directory.path / "export"
    opened = open_run(loaded, directory, report=say)
    graph = build_job_graph(opened.rows, baseline=baseline)
    if all(directory.phase(job.phase, job.module).result for job in graph) and is_complete_export(exported):
        say(f"{directory.path} is done already")
    with ProgressReporter(console()) as reporter:
        helper = shared_loader_job(directory) if co_train else None
        runner = LocalRunner(directory, jobs or os.cpu_count() or 1, reporter, nproc, helper)
        code = runner.execute(graph)
    summary = directory.update_summary()
    if code is Exit.PREEMPTED:
        say(f"stopped; nothing is lost. Go on with the same command:\n  {shlex.join(['bigincubate', *sys.argv[1:]])}")
        raise SystemExit(code)
    if code is not Exit.DONE:
        fail("not everything is done, for the reasons above; the same command goes on with what is missing", code)
    snippet = None if is_complete_export(exported) else export(directory.path, exported)
    from ..report.console_tables import summary_table

    console().print(summary_table(loaded.name, summary, opened.rows))
    say(f"\nmodel:   {exported}" + (f"\n         {snippet}" if snippet else ""))
    say(f"curves:  tensorboard --logdir {directory.path}")
    say(f"next:    bigincubate evaluate {directory.path} --data {opened.data.path}")


@app.command()
def train(
    recipe: RecipeArgument,
    directory: RunDirOption,
    phase: Annotated[str, Option(help="pretrain, incubate, finetune or end_to_end.")],
    module: Annotated[str | None, Option(help="Which module to incubate; auto: the Slurm array index.")] = None,
    sets: SetOption = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Train one phase in this process, or as a rank under torchrun or srun. Run again, it resumes."""
    from ..config import PHASES, load_recipe

    if phase not in PHASES:
        raise ConfigError(f"--phase {phase}: there are {', '.join(PHASES)}")
    loaded = load_recipe(recipe, sets or ())
    from ..distributed.parent_death import stop_with_parent
    from ..distributed.process_group import DistributedContext
    from ..launchers.slurm.environment import array_index, set_torchrun_variables
    from ..launchers.slurm.job_queue import SlurmQueue
    from ..planning.context import open_run

    stop_with_parent()
    if module is not None and module != "auto" and not module.isdigit():
        raise ConfigError(f"--module {module}: expected a number, or auto")
    number = array_index() if module == "auto" else None if module is None else int(module)
    set_torchrun_variables()
    with closing(DistributedContext.detect()) as env:
        setup_logging(log_level, env.rank)
        with env.main_process_first():
            opened = open_run(loaded, directory, report=say, module=number)
            context = opened.phase(phase, number, env)
        from ..tasks.metric import describe_metrics
        from ..training.run_phase import train_phase

        with context.with_local_data() as local:
            result = train_phase(local, queue=SlurmQueue())
        if env.is_main:
            say(f"{context.row.title}: done, {describe_metrics(context.task.metrics, result['metrics'])}")
