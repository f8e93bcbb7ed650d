"""The command line. Commands are thin: they read their arguments, and import what they need when they run."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import ArtifactError, BigincubateError, ConfigError, DamagedError, Exit

app = typer.Typer(
    name="bigincubate",
    help="Train a large model in pieces: grow its modules apart, join them, fine-tune (Deep Incubation).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Prepare data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
checkpoint_app = typer.Typer(help="Look at resume checkpoints, verify them, rewrite them.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a .toml file.")]
RunDirOption = Annotated[Path, typer.Option("--run-dir", help="The run's directory; made where it is missing.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set train.lr=1e-3")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
RunArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]
CheckpointsArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A run directory, a phase's directory, or a checkpoint.")
]


@app.command()
def plan(
    recipe: RecipeArgument,
    sets: SetOption = None,
    world: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Numbers of ranks to plan for [default: 1, 2 and 8].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What each phase and module costs: depths, parameters, FLOPs, memory, communication. Needs no data.

    Memory and communication are those of a rank, under each sharding strategy."""
    from .config import load_recipe

    loaded = load_recipe(recipe, sets or ())
    if world is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", world):
        raise ConfigError(f"--world {world}: expected numbers of ranks, such as 1,2,8")
    from .footprint import footprints, shareable
    from .plan import cost_plan, make_plan, plan_json
    from .workflow import expected_samples

    worlds = [int(ranks) for ranks in world.split(",")] if world else [n for n in (1, 2, 8) if shareable(loaded, n)]
    cut = make_plan(loaded)
    rows = cost_plan(loaded, cut, expected_samples(loaded))
    counted = plan_json(loaded, cut, rows)
    spread = footprints(loaded, cut, rows, worlds)
    for row in counted["rows"]:
        row["sharding"] = [asdict(each) for each in spread[row["key"]]]
    if as_json:
        print(json.dumps(counted, indent=1))
        return
    from .tables import plan_table, sharding_tables

    for table in (plan_table(counted), *sharding_tables(counted)):
        console().print(table, "")
    own, baseline = counted["incubation_flops"], counted["end_to_end_flops"]
    ratio = f"{own / baseline:.3f} times" if baseline else "no"
    say(
        f"incubation: {own / 1e15:.4g} PFLOPs in all, {100 * counted['finetune_share']:.1f}% of them fine-tuning;"
        f" {ratio} end-to-end training's {baseline / 1e15:.4g}"
    )


@app.command()
def run(
    recipe: RecipeArgument,
    run_dir: RunDirOption,
    jobs: Annotated[int, typer.Option(min=1, help="Phases that run at the same time.")] = os.cpu_count() or 1,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks that train each phase together.")] = 1,
    sets: SetOption = None,
    baseline: Annotated[bool, typer.Option(help="Also train the same model end to end, at equal FLOPs.")] = False,
) -> None:
    """Everything, on this machine: meta model, modules, assembly, fine-tuning, export. Run again, it goes on."""
    from .config import load_recipe

    loaded = load_recipe(recipe, sets or ())
    from .cluster.local import LocalRunner, job_graph
    from .cluster.progress import Reporter
    from .export import export as export_model
    from .export import whole
    from .rundir import RunDir
    from .workflow import ensure_data, ensure_plan

    directory, exported = RunDir(run_dir), run_dir / "export"
    directory.open(loaded)
    data = ensure_data(loaded, directory, say)
    _, rows = ensure_plan(loaded, directory, data)
    graph = job_graph(rows, baseline=baseline)
    if all(directory.phase(job.phase, job.module).result for job in graph) and whole(exported):
        say(f"{run_dir} is done already")
    with Reporter(console()) as reporter:
        code = LocalRunner(directory, jobs, reporter, nproc).execute(graph)
    summary = directory.summary()
    if code is Exit.PREEMPTED:
        say(f"stopped; nothing is lost. Go on with the same command:\n  {command_line()}")
        raise typer.Exit(code)
    if code is not Exit.DONE:
        fail("not everything is done, for the reasons above; the same command goes on with what is missing", code)
    snippet = None if whole(exported) else export_model(run_dir, exported)
    from .tables import summary_table

    console().print(summary_table(loaded.name, summary))
    say(f"\nmodel:   {exported}" + (f"\n         {snippet}" if snippet else ""))
    say(f"curves:  tensorboard --logdir {run_dir}")
    say(f"next:    bigincubate evaluate {run_dir} --data {data.path}")


@app.command()
def train(
    recipe: RecipeArgument,
    run_dir: RunDirOption,
    phase: Annotated[str, typer.Option(help="pretrain, incubate, finetune or end_to_end.")],
    module: Annotated[str | None, typer.Option(help="Which module to incubate; auto: the Slurm array index.")] = None,
    sets: SetOption = None,
) -> None:
    """One phase, in this process, or as a rank under torchrun or srun. Run again, it goes on."""
    from .config import PHASES, load_recipe

    if phase not in PHASES:
        raise ConfigError(f"--phase {phase}: there are {', '.join(PHASES)}")
    loaded = load_recipe(recipe, sets or ())
    from .cluster.env import RunEnv, array_index
    from .cluster.orphan import die_with_parent
    from .rundir import RunDir
    from .workflow import ensure_data, ensure_plan, find_row

    die_with_parent()
    if module is not None and module != "auto" and not module.isdigit():
        raise ConfigError(f"--module {module}: expected a number, or auto")
    number = array_index() if module == "auto" else None if module is None else int(module)
    env = RunEnv.detect()
    try:
        directory = RunDir(run_dir)
        with env.first():
            directory.open(loaded)
            data = ensure_data(loaded, directory, say)
            cut, rows = ensure_plan(loaded, directory, data)
        row = cut.row(phase, number)
        from .trainer import train as train_phase

        result = train_phase(loaded, cut, row, find_row(rows, row.phase, number), directory, data, env)
        if env.is_main:
            say(f"{row.title}: done, top-1 {result['top1']:.2f}%, loss {result['loss']:.4f}")
    finally:
        env.close()


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="DIR_OR_ARTIFACT", help="A run, an artifact or an export.")],
    data: Annotated[Path, typer.Option("--data", help="Prepared data; its validation split is used.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    as_json: JsonOption = False,
) -> None:
    """Top-1, top-5 and loss of a finished model on a validation split."""
    from .cluster.env import RunEnv
    from .config import Augment
    from .data.dataset import open_dataset
    from .data.streams import EvalStream
    from .export import load_model
    from .tasks.classification import evaluate as score

    model, spec = load_model(source)
    info = open_dataset(data)
    if len(info.classes) != spec.num_classes:
        raise ConfigError(f"{data} has {len(info.classes)} classes, the model {spec.num_classes}")
    env = RunEnv.detect()
    augment = Augment(mean=spec.mean, std=spec.std, interpolation=spec.interpolation, eval_crop=spec.eval_crop)
    stream = EvalStream(
        info,
        "val",
        augment,
        img_size=spec.img_size,
        batch_size=batch_size,
        rank=env.rank,
        world=env.world,
        workers=0,
    )
    try:
        scores = score(model.to(env.device), stream, env)
    finally:
        env.close()
    if not env.is_main:
        return
    if as_json:
        print(json.dumps(scores, indent=1))
    else:
        say(
            f"top-1 {scores['top1']:.2f}%  top-5 {scores['top5']:.2f}%  loss {scores['loss']:.4f}"
            f"  on {scores['samples']} images of {data}"
        )


@app.command()
def status(
    run_dir: RunArgument,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option(help="Again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Where a run stands: state, step, loss, speed and time left of every phase."""
    from .cluster.status import run_status
    from .rundir import RunDir

    directory = RunDir(run_dir)
    if as_json:
        print(json.dumps(run_status(directory), indent=1))
        return
    from rich.live import Live

    from .tables import status_table

    def table() -> Any:
        return status_table(str(run_dir), run_status(directory))

    if not watch:
        console().print(table())
        return
    with Live(table(), console=console(), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(2)
                live.update(table(), refresh=True)
        except KeyboardInterrupt:
            pass


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
    """Everything, on Slurm: meta model, an array of modules, assembly and fine-tuning. Again: what is missing."""
    from .config import load_recipe

    given = [f'slurm.{key}="{value}"' for key, value in (("partition", partition), ("account", account)) if value]
    loaded = load_recipe(recipe, [*(sets or ()), *given])
    from .rundir import RunDir
    from .workflow import ensure_data, ensure_plan

    directory = RunDir(run_dir)
    if dry_run:
        from .cluster.slurm import show
        from .plan import make_plan

        say(show(loaded, directory, make_plan(loaded).modules, baseline=baseline))
        return
    directory.open(loaded)
    ensure_plan(loaded, directory, ensure_data(loaded, directory, say))
    if baseline:
        directory.note("baseline")
    proceed(directory)


@app.command()
def resume(
    run_dir: RunArgument,
    gate: Annotated[bool, typer.Option("--gate", hidden=True, help="Called by a gate.")] = False,
) -> None:
    """Submit to Slurm what is missing of a run."""
    from .rundir import RunDir

    proceed(RunDir(run_dir), os.environ.get("SLURM_JOB_ID") if gate else None)


def proceed(directory: Any, gate: str | None = None) -> None:
    """Submit what is missing; where nothing is, export."""
    from .cluster.local import job_graph
    from .cluster.slurm import advance
    from .export import export as export_model
    from .export import whole
    from .files import read_lines
    from .workflow import ensure_data, ensure_plan

    loaded = directory.recipe()
    data = ensure_data(loaded, directory)
    _, rows = ensure_plan(loaded, directory, data)
    baseline = any(row["event"] == "baseline" for row in read_lines(directory.path / "events.jsonl"))
    if not advance(loaded, job_graph(rows, baseline=baseline), directory, data=data.digest, gate=gate, say=say):
        say(f"watch:   bigincubate status {directory.path} --watch")
        return
    exported = directory.path / "export"
    if not whole(exported):
        export_model(directory.path, exported)
    from .tables import summary_table

    console().print(summary_table(loaded.name, directory.summary()))
    say(f"model:   {exported}")


@app.command(hidden=True)
def settle(
    run_dir: RunArgument,
    phase: Annotated[str, typer.Option()],
    job: Annotated[str, typer.Option()],
    code: Annotated[int, typer.Option()],
    module: Annotated[str | None, typer.Option()] = None,
) -> None:
    """The end of a Slurm job: done, requeued, or failed for good."""
    from typing import cast

    from .cluster.env import array_index
    from .cluster.settle import settle as end
    from .config import Phase
    from .rundir import RunDir

    number = array_index() if module == "auto" else None if module is None else int(module)
    code, why = end(RunDir(run_dir).phase(cast("Phase", phase), number), job, code)
    say(f"job {job}: {why}")
    raise typer.Exit(code)


@app.command()
def cancel(run_dir: RunArgument) -> None:
    """Take a run's jobs out of Slurm's queue. What runs writes a checkpoint first; `resume` goes on."""
    from .cluster.slurm import cancel as take_out
    from .rundir import RunDir

    directory = RunDir(run_dir)
    directory.recipe()
    ids = take_out(directory)
    say(f"cancelled: {', '.join(ids)}" if ids else "nothing of this run is in the queue")


@app.command()
def logs(
    run_dir: RunArgument,
    module: Annotated[int | None, typer.Option(min=0, help="Of this module alone.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="From the end of each.")] = 20,
    follow: Annotated[bool, typer.Option(help="Go on printing, until Ctrl-C.")] = False,
) -> None:
    """The ends of a run's logs, of Slurm jobs and of local processes."""
    import contextlib
    import subprocess

    pattern = f"modules/{module:02d}/logs/*.log" if module is not None else "**/logs/*.log"
    files = sorted(run_dir.glob(pattern)) + sorted(
        (run_dir / "slurm").glob(f"*_{'*' if module is None else module}.out")
    )
    if not files:
        raise ArtifactError(f"no logs in {run_dir} yet")
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(["tail", "-n", str(lines), *(["-F"] if follow else []), *map(str, files)], check=False)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A run, a phase's directory or an artifact.")],
    out: Annotated[Path, typer.Option(help="Where to write model.safetensors and config.json.")],
) -> None:
    """Write a finished model as a folder that timm loads."""
    from .export import export as export_model

    say(f"written to {out}; in Python:\n  {export_model(source, out)}")


@data_app.command("prepare")
def data_prepare(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="An image tree, a CIFAR archive, or digits.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Of each class, where the tree has no validation part.")
    ] = 0.2,
) -> None:
    """Write images as hashed MDS shards that training streams. Killed and run again, it goes on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .data.prepare import prepare

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), disable=not console().is_terminal) as progress:
        bar = progress.add_task("preparing", total=None)
        info = prepare(
            source,
            out,
            jobs=jobs,
            val_fraction=val_fraction,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in info.samples.items())
    say(f"{out}: {counts} images of {len(info.classes)} classes; use it with --set data.path={out}")


@checkpoint_app.command("list")
def checkpoint_list(folder: CheckpointsArgument, as_json: JsonOption = False) -> None:
    """Every checkpoint: step, ranks, bytes, when; whether it was committed, and whether its hashes are right."""
    from .checkpoint.offline import survey
    from .tables import checkpoint_table

    rows = survey(folder)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console().print(checkpoint_table(str(folder), rows))


@checkpoint_app.command("verify")
def checkpoint_verify(folder: CheckpointsArgument) -> None:
    """Hash every file of every committed checkpoint; exit code 6 where one is damaged."""
    from .checkpoint.offline import survey

    rows = [row for row in survey(folder) if row["committed"]]
    if not rows:
        raise ArtifactError(f"no checkpoint in {folder} was ever committed")
    for row in rows:
        if row["problem"] is None:
            say(f"sound  {row['path']}")
    if damaged := [row["problem"] for row in rows if row["problem"] is not None]:
        raise DamagedError(f"{len(damaged)} of {len(rows)} damaged: {'; '.join(damaged)}")


@checkpoint_app.command("convert")
def checkpoint_convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A committed checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    ranks: Annotated[int, typer.Option(min=1, help="Files to spread it over; 1: whole tensors in one file.")] = 1,
) -> None:
    """Rewrite a checkpoint as the files of so many ranks. Resuming does not need it: any phase takes up any layout."""
    from .checkpoint.offline import convert

    convert(checkpoint, out, ranks=ranks)
    say(f"{out}: the checkpoint of {checkpoint} as {ranks} file{'s' if ranks > 1 else ''} of tensors")


@app.command()
def recipes() -> None:
    """The recipes that come with the package."""
    from .config import load_recipe, shipped

    for name, file in shipped().items():
        say(f"{name:<20} {load_recipe(name).description}\n{'':<20} {file}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What is installed, what is missing, and why it matters."""
    from .doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps(checks, indent=1))
    else:
        for check in checks:
            say(f"{'ok' if check['ok'] else 'missing' if check['needed'] else 'optional':<9}{check['text']}")
    if any(check["needed"] and not check["ok"] for check in checks):
        raise typer.Exit(Exit.ENVIRONMENT)


def _version(asked: bool) -> None:
    if asked:
        say(f"bigincubate {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """Options of the program itself."""


# ------------------------------------------------------------------------------------------------ the edge


def console() -> Any:
    from rich.console import Console

    # a pipe has no width: tables must not be folded to a terminal's
    return Console() if sys.stdout.isatty() else Console(width=200)


def say(text: str) -> None:
    print(text, flush=True)


def command_line() -> str:
    import shlex

    return shlex.join(["bigincubate", *sys.argv[1:]])


def fail(message: str, code: int) -> NoReturn:
    print(f"bigincubate: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def main() -> NoReturn:
    """Run, and end with a documented exit code. What a user can cause is one line, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except BigincubateError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail("interrupted; nothing that was committed is lost, the same command goes on", Exit.PREEMPTED)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), Exit.ENVIRONMENT)
    except Exception as error:
        # usage errors of the argument parser, wherever this version of typer keeps their class
        if not hasattr(error, "format_message"):
            raise
        fail(f"{error.format_message()} (see --help)", Exit.USAGE)
    raise SystemExit(code or 0)
