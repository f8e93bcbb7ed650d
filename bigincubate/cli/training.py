"""Commands that train, and the command that computes the cost of training."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..distributed.rank_logging import LEVEL_VARIABLE, setup_logging
from ..errors import ConfigError, Preempted, format_command
from .app import (
    JsonOption,
    LogLevelOption,
    MethodOption,
    RecipeArgument,
    RunDir,
    RunDirOption,
    SetOption,
    add_method,
    app,
    check_method,
    console,
    escape_control_characters,
    parse_run_dir,
    say,
    say_json,
)

VerifyDataOption = Annotated[
    bool,
    Option("--verify-data", help="Hash every data shard first, even if it was hashed before and did not change."),
]

# as text; int() also accepts digits of other scripts, and fails on thousands of digits
NUMBER = r"0|[1-9][0-9]{0,8}"


@app.command()
def plan(
    recipe: RecipeArgument,
    sets: SetOption = None,
    method: MethodOption = None,
    world: Annotated[
        str | None, Option(metavar="N,N,…", help="Numbers of ranks for --sharding (default: 1, 2 and 8).")
    ] = None,
    sharding: Annotated[
        bool, Option("--sharding", help="Also show memory and communication per rank, for each sharding strategy.")
    ] = False,
    cluster: Annotated[
        str | None,
        Option(
            metavar="nodes=N,gpus=N,tflops=X",
            help="Also estimate the time on a cluster, at X TFLOP/s per GPU, or with rates=RUN at a run's throughput.",
        ),
    ] = None,
    ways: Annotated[
        bool, Option("--ways", help="Also compare with expansion, end-to-end training and the meta model alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the cost of each phase: depths, parameters, FLOPs, memory, length.

    No data is needed if data.train_samples is set.

    With --sharding or --world, also memory and communication per rank, for each sharding strategy. With --ways, also
    what each way to train the target costs with as many workers as modules. For the recipe of a run (DIR/recipe.toml),
    the costs are read from the plan of the run.
    """
    from ..config import load_recipe

    loaded = load_recipe(recipe, add_method(sets, method))
    check_method(method, loaded)
    if world is not None and not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", world):
        raise ConfigError(f"--world {world}: expected numbers of ranks, such as 1,2,8")
    from ..planning.planned_row import stored_plan

    run = parse_run_dir(str(Path(recipe).parent))
    sharding = sharding or world is not None
    stored = Path(recipe).name == run.recipe_file.name and not (as_json or sharding or cluster or ways)
    costs = stored_plan(run, loaded) if stored else None  # needs no torch
    if costs is None:
        from ..api import plan as count_costs

        world_sizes = [int(ranks) for ranks in world.split(",")] if world else []
        costs = count_costs(loaded, world_sizes=world_sizes, cluster=cluster, sharding=sharding or as_json, ways=ways)
    if as_json:
        say_json(costs)
        return
    from ..report.console_tables import cluster_table, describe_unused_flops, plan_table, sharding_tables, ways_table
    from ..report.units import format_flops_column

    console().print(plan_table(costs), "")
    for table in sharding_tables(costs) if sharding else ():
        console().print(table, "")
    own, baseline = costs["incubation_flops"], costs["end_to_end_flops"]
    unit, (shown, shown_baseline) = format_flops_column([own, baseline])
    ratio = f"{own / baseline:.3f} times the" if baseline else "compared with the"
    way = "incubation" if loaded.plan.incubated else "expansion"
    total = f"{way}: {shown} {unit} in total, {100 * costs['finetune_share']:.1f}% of them for fine-tuning"
    if loaded.finetune.init is not None:
        total = f"fine-tuning: {shown} {unit}, without those of {loaded.finetune.init}"
    say(f"{total}; {ratio} {shown_baseline} {unit} of end-to-end training")
    if unused := describe_unused_flops(costs):
        say(unused)
    if cluster is not None:
        console().print("", cluster_table(costs["cluster"]))
    if ways:
        console().print("", ways_table(costs))
        say(
            "path: FLOPs on the critical path; MiB: memory of a worker, before and in the last phase. The workers are"
            " separate, without a network: each trains a module, and one of them trains everything else.\n"
            "DP: the workers are connected, and also share the batches of all other phases (data parallelism); GB: what"
            " each of them passes to collectives."
        )


@app.command()
def run(
    recipe: RecipeArgument,
    directory: RunDirOption,
    jobs: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Number of phases to run in parallel (default: number of cores, or what --co-train needs).",
        ),
    ] = None,
    nproc: Annotated[int, Option(min=1, metavar="N", help="Number of ranks that train each phase.")] = 1,
    sets: SetOption = None,
    method: MethodOption = None,
    baseline: Annotated[bool, Option(help="Also train the same model end to end, at equal FLOPs.")] = False,
    small: Annotated[
        bool, Option("--smoke", help="Run a small version of the recipe on generated data; takes one to two minutes.")
    ] = False,
    co_train: Annotated[
        bool, Option("--co-train", help="Train all modules in parallel with one shared loader; same results.")
    ] = False,
    verify_data: VerifyDataOption = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Run all phases on this machine: meta model, modules, assembly, fine-tuning, export. Run it again to resume."""
    from ..config import load_recipe
    from ..planning.smoke import smoke

    loaded = load_recipe(recipe, add_method(sets, method), smoke if small else None)
    check_method(method, loaded)
    os.environ[LEVEL_VARIABLE] = log_level  # for the processes of the phases
    setup_logging(log_level)
    helper = None
    if co_train:
        from ..experimental.shared_loader.launch import count_parallel_jobs, shared_loader_job

        jobs, helper = count_parallel_jobs(loaded, jobs, baseline), shared_loader_job(directory)
    from ..api import run as run_phases

    try:
        result = run_phases(
            loaded,
            directory.path,
            jobs=jobs,
            ranks=nproc,
            baseline=baseline,
            console=console(),
            helper=helper,
            verify_data=verify_data,
        )
    except Preempted as stopped:
        say(f"stopped; all progress is saved. To resume, run the same command:\n  {format_command(*sys.argv[1:])}")
        raise SystemExit(stopped.code) from None
    from ..report.console_tables import summary_table

    if result.already_done:
        say(f"{directory.path} is already done")
    console().print(summary_table(loaded.name, result.results, result.context.rows))
    if example := (result.results["finetune"] or {}).get("example"):
        say("\nexample of the model's output:")
        say("\n".join(f"    {escape_control_characters(line)}" for line in str(example).splitlines()))
    say(f"\nmodel:   {result.export}" + (f"\n         {result.load_code}" if result.load_code else ""))
    say(f"curves:  tensorboard --logdir {shlex.quote(str(directory.path))}")
    say(f"next:    {format_command('evaluate', directory.path, '--data', result.context.data.path)}")


@app.command()
def train(
    recipe: RecipeArgument,
    directory: RunDirOption,
    phase: Annotated[str, Option(help="pretrain, incubate, finetune or end_to_end.")],
    module: Annotated[str | None, Option(help="Index of the module to incubate; auto: the Slurm array index.")] = None,
    sets: SetOption = None,
    verify_data: VerifyDataOption = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Train one phase in this process, or as a rank under torchrun or srun. Run it again to resume."""
    from ..config import PHASES, load_recipe

    if phase not in PHASES:
        raise ConfigError(f"--phase {phase}: expected one of {', '.join(PHASES)}")
    loaded = load_recipe(recipe, sets or ())
    from ..api import train_phase
    from ..distributed.parent_death import stop_with_parent
    from ..distributed.process_group import read_count
    from ..launchers.slurm.environment import array_index, set_torchrun_variables

    stop_with_parent()
    if module is not None and module != "auto" and not re.fullmatch(NUMBER, module):
        raise ConfigError(f"--module {module}: expected a number, or auto")
    number = array_index() if module == "auto" else None if module is None else int(module)
    set_torchrun_variables()
    setup_logging(log_level, read_count("RANK", 0))
    train_phase(loaded, directory.path, phase, number, report=say, verify_data=verify_data)


@app.command()
def fork(
    source: Annotated[RunDir, Argument(metavar="RUN", parser=parse_run_dir, help="The run directory to fork.")],
    new: Annotated[RunDir, Argument(metavar="NEW_RUN", parser=parse_run_dir, help="The new run directory.")],
    recipe: Annotated[
        str | None, Argument(metavar="[RECIPE]", help="Recipe of the new run (default: that of RUN).")
    ] = None,
    sets: SetOption = None,
) -> None:
    """Create a new run that takes over every phase of RUN that a changed recipe leaves valid. RUN is not changed.

    For example, several fine-tunings of the same modules. Artifacts and checkpoints become hard links if possible.
    """
    from ..config import load_recipe

    source.load_recipe()
    loaded = load_recipe(recipe or source.recipe_file, sets or ())
    from ..api import fork as fork_run
    from ..planning.fork_run import describe_fork

    made = fork_run(source.path, new.path, loaded, report=say)
    say("\n".join(describe_fork(made, source)))
    say(f"next:    {format_command('run', new.recipe_file, '--run-dir', new.path)}")
