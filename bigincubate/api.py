"""The Python API: plan, train, load and evaluate. The command line calls the same functions.

They print nothing and raise the errors of :mod:`bigincubate.errors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from .config import PHASES, Phase, Recipe
from .errors import ConfigError, Exit, check_integer, error_of_code
from .files import expand_path

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from .launchers.local import HelperJob
    from .planning.context import RunContext
    from .planning.fork_run import Fork
    from .training.evaluation import ClassFiles


def _ignore(text: str) -> None:
    """Ignore a progress message."""


def _check_recipe(recipe: object) -> None:
    """Check that an argument is a recipe, and not for example its name.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe is a {type(recipe).__name__}; pass a Recipe, such as load_recipe('digits')")


def plan(
    recipe: Recipe,
    *,
    world_sizes: Sequence[int] = (),
    cluster: str | None = None,
    sharding: bool = True,
    ways: bool = False,
) -> dict[str, Any]:
    """Compute the cost of each phase of a recipe. Needs neither data nor a GPU.

    Args:
        recipe: The recipe.
        world_sizes: Numbers of ranks for which to estimate memory and communication; by default those of 1, 2 and 8
            that divide the batch sizes.
        cluster: Cluster for which to estimate the training time: ``"nodes=8,gpus=8,tflops=200"``, or
            ``"...,rates=RUN_DIR"`` to use the measured throughput of the phases of a run.
        sharding: Whether to estimate memory and communication per rank for each sharding strategy; if not,
            ``world_sizes`` has no effect.
        ways: Whether to compare the recipe with other ways to train its target.

    Returns:
        A dict that can be written as JSON: ``rows`` (one dict per phase: depths, parameters, steps, FLOPs, bytes per
        strategy), ``incubation_flops``, ``end_to_end_flops``, ``finetune_share``, and, if asked for, ``cluster`` and
        ``ways`` (one dict per way: FLOPs, FLOPs on the critical path, bytes per worker).

    Raises:
        ConfigError: An argument is invalid, the model is not supported, the depths do not fit it, or
            ``data.train_samples`` is missing.

    Example:
        >>> costs = bi.plan(bi.load_recipe("imagenet-vit-b"))
        >>> costs["incubation_flops"] / costs["end_to_end_flops"]
    """
    _check_recipe(recipe)
    for ranks in world_sizes:
        check_integer("world_sizes", ranks)
    from .planning.cost import cost_plan, count_costs, plan_json
    from .planning.memory import all_batches_divisible, batch_divisible, estimate_footprints
    from .planning.phases import make_plan
    from .planning.prepare_run import expected_samples
    from .planning.walltime import critical_path_seconds, estimate_walltime, parse_cluster
    from .planning.ways import compare_ways

    worlds = list(world_sizes) or [ranks for ranks in (1, 2, 8) if all_batches_divisible(recipe, ranks)]
    phases, samples = make_plan(recipe), expected_samples(recipe)
    counted = count_costs(recipe, phases)
    rows = cost_plan(recipe, phases, samples, counted)
    costs = plan_json(recipe, phases, rows)
    footprints = estimate_footprints(recipe, phases, rows, worlds) if sharding else {}
    for row in costs["rows"]:
        row["sharding"] = [asdict(footprint) for footprint in footprints.get(row["key"], ())]
    machines = parse_cluster(cluster) if cluster is not None else None
    if machines is not None:
        estimates = estimate_walltime(
            rows, machines, lambda row, ranks: batch_divisible(recipe.settings(row.phase), ranks)
        )
        own = [estimate for estimate in estimates if estimate.key != "end_to_end"]
        costs["cluster"] = {
            "gpus": machines.gpus,
            "phases": [asdict(estimate) for estimate in estimates],
            "seconds": critical_path_seconds(own, machines.gpus),
            "gpu_seconds": sum(estimate.gpus * estimate.seconds for estimate in own),
        }
    if ways:
        costs["ways"] = [asdict(way) for way in compare_ways(recipe, phases, samples, counted, machines)]
    return costs


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        path: The run directory.
        export: The folder with the final model, for ``timm.create_model(f"local-dir:{export}", pretrained=True)``.
        results: The result of each phase: ``meta``, ``modules`` (a list by number up to the last incubated module;
            None for a module that is not incubated), ``assembled``, ``finetune`` and ``end_to_end`` (None if it was not
            trained). A result has ``metrics``, ``steps``, ``seen``, ``flops``, ``seconds``.
        load_code: Python code that loads the final model; None if an earlier call exported it.
        already_done: Whether the run was complete before the call.
        context: The recipe, data and plan of the run.
    """

    path: Path
    export: Path
    results: dict[str, Any]
    load_code: str | None
    already_done: bool
    context: RunContext


def run(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    jobs: int | None = None,
    ranks: int = 1,
    baseline: bool = False,
    console: Console | None = None,
    helper: HelperJob | None = None,
    verify_data: bool = False,
) -> RunResult:
    """Run all phases on this machine: meta model, modules, assembly, fine-tuning, export. Call it again to resume.

    Each phase runs in separate processes, which log to ``logs/`` in the folder of the phase. Call this from the main
    thread, so that every phase writes a checkpoint on SIGINT or SIGTERM. On Linux, orphans of child processes become
    children of this process until the phases have ended.

    Args:
        recipe: The recipe.
        run_dir: The run directory; created if it is missing.
        jobs: Maximum number of phases that run in parallel; None for the number of cores.
        ranks: Number of processes that train each phase, with one GPU each.
        baseline: Whether to train the same model end to end as well, with the same FLOPs.
        console: Console for progress messages; None to print nothing.
        helper: Processes that serve the modules, such as the shared loader of ``bigincubate run --co-train``.
        verify_data: Whether to hash every shard first, even if it was hashed before and did not change.

    Returns:
        The results, and the path of the final model.

    Raises:
        Preempted: A stop signal was received, and checkpoints were written.
        BigincubateError: A phase failed; the message names the phase, the reason and its log file.

    Example:
        >>> result = bi.run(bi.load_recipe("digits"), "runs/digits")
        >>> result.results["finetune"]["metrics"]["top1"]
    """
    _check_recipe(recipe)
    check_integer("ranks", ranks)
    if jobs is not None:
        check_integer("jobs", jobs)
    from rich.console import Console

    from .launchers.fork_server import ForkServers
    from .launchers.local import LocalRunner
    from .launchers.progress import ProgressReporter
    from .planning.job_graph import build_job_graph
    from .report.run_cost import TimeEstimate, describe_cost
    from .storage.run_directory import RunDir, is_complete_export
    from .tasks.names import modules_to_preload

    directory = RunDir(expand_path(run_dir))
    exported = directory.exported
    servers = ForkServers(modules_to_preload(recipe.task.name))
    with ProgressReporter(console or Console(quiet=True)) as reporter, servers:
        runner = LocalRunner(directory, jobs or os.cpu_count() or 1, reporter, ranks, helper, servers=servers)
        if directory.phase("finetune" if recipe.finetune.init else "pretrain").result is None:
            runner.start_server(baseline=baseline)
        from .data.verification import hash_all_shards  # these import NumPy or torch, while the server does too
        from .planning.context import open_run
        from .report.model_card import export_with_card

        opened = open_run(recipe, directory, report=reporter.say)
        if verify_data:
            reporter.say(f"verifying {opened.data.path}")
            hash_all_shards(opened.data)
        graph = build_job_graph(opened.rows, baseline=baseline)
        done = all(directory.phase(job.phase, job.module).result for job in graph) and is_complete_export(exported)
        reporter.say(f"{recipe.name}: {describe_cost(directory, graph)}")
        runner.estimate = TimeEstimate(directory, graph).update
        code = runner.execute(graph)
    results = directory.update_summary()
    if code is Exit.PREEMPTED:
        raise error_of_code(code)(f"{directory.path}: stopped after writing checkpoints; run it again to resume")
    if code is not Exit.DONE:
        raise error_of_code(code)(f"some phases did not finish: {'; '.join(reporter.failures)}; run it again to resume")
    snippet = None if is_complete_export(exported) else export_with_card(directory.path, exported)
    return RunResult(directory.path, exported, results, snippet, done, opened)


def train_phase(
    recipe: Recipe,
    run_dir: str | Path,
    phase: Phase,
    module: int | None = None,
    *,
    report: Callable[[str], None] = _ignore,
    verify_data: bool = False,
) -> dict[str, Any]:
    """Train one phase in this process, or as one rank under ``torchrun``. Call it again to resume.

    It can resume from a checkpoint of a different number of ranks or sharding strategy. Call it from the main thread,
    so that it can write a checkpoint when it receives a stop signal.

    Args:
        recipe: The recipe.
        run_dir: The run directory; created if it is missing.
        phase: ``"pretrain"``, ``"incubate"``, ``"finetune"`` or ``"end_to_end"``.
        module: Index of the module to incubate; None for the other phases.
        report: Called on rank 0 with a message before slow preparations, and with the result.
        verify_data: Whether to hash every shard first, even if it was hashed before and did not change.

    Returns:
        The result: ``metrics`` by name, ``headline`` (the name of the first), ``samples``, ``unit``, ``steps``,
        ``seen``, ``flops``, ``seconds``. The weights are in the run directory.

    Raises:
        ConfigError: The settings are incompatible with the data or with phases already trained in the directory.
        ArtifactError: The phase needs the result of a phase that has not been trained.
        Preempted: A stop signal was received, and a checkpoint was written.
        NonFiniteError: The gradient was not finite in too many steps, or the result is not finite.
        LockedError: Another process is training this phase.

    Example:
        >>> recipe = bi.load_recipe("digits")
        >>> bi.train_phase(recipe, "runs/digits", "pretrain")["metrics"]["top1"]
        >>> bi.train_phase(recipe, "runs/digits", "incubate", module=2)
    """
    _check_recipe(recipe)
    if phase not in PHASES:
        raise ConfigError(f"phase = {phase!r}: expected one of {', '.join(PHASES)}")
    if module is not None:
        check_integer("module", module, least=0)
    from .data.verification import hash_all_shards
    from .distributed.process_group import DistributedContext, restored_rank_variables
    from .launchers.slurm.job_queue import SlurmQueue
    from .planning.context import open_run
    from .storage.run_directory import RunDir
    from .tasks.metric import describe_metrics
    from .training.run_phase import train_phase as train

    with restored_rank_variables(), closing(DistributedContext.detect()) as env:
        with env.main_process_first():
            opened = open_run(recipe, RunDir(expand_path(run_dir)), report=report, module=module)
            context = opened.phase(phase, module, env)
            if verify_data and env.is_main:
                report(f"verifying {context.data.path}")
                hash_all_shards(context.data)
        with context.with_local_data() as local:
            result = train(local, queue=SlurmQueue())
        if env.is_main:
            report(f"{context.row.title}: done, {describe_metrics(context.task.metrics, result['metrics'])}")
    return result


def fork(
    run_dir: str | Path,
    new_run_dir: str | Path,
    recipe: Recipe | None = None,
    *,
    report: Callable[[str], None] = _ignore,
) -> Fork:
    """Create a run that takes over the phases of another run that a changed recipe leaves valid.

    Args:
        run_dir: The run, which is not changed.
        new_run_dir: The new run directory.
        recipe: The recipe of the new run; by default that of the run.
        report: Called with a message before slow work.

    Returns:
        The phases, each with ``taken`` and ``reason``.

    Raises:
        ArtifactError: ``run_dir`` is not a run directory.
        ConfigError: ``new_run_dir`` has trained phases or other files, or the recipe leaves no phase valid.
        LockedError: A process is training a phase of the run.

    Example:
        >>> recipe = bi.load_recipe("runs/digits/recipe.toml", ["finetune.train.lr=5e-4"])
        >>> bi.fork("runs/digits", "runs/slower", recipe)
        >>> bi.run(recipe, "runs/slower")
    """
    from .launchers.slurm.job_queue import SlurmQueue
    from .planning.fork_run import fork_run
    from .storage.run_directory import RunDir

    source, new = RunDir(Path(run_dir)), RunDir(Path(new_run_dir))
    return fork_run(source, new, recipe, queue=SlurmQueue(), report=report)


def load_model(source: str | Path) -> nn.Module:
    """Load a finished model for inference.

    Args:
        source: A run directory, the folder of a phase, an artifact, or an exported folder.

    Returns:
        The trained model (a timm model, if the recipe names one), on the CPU in evaluation mode.

    Raises:
        ArtifactError: ``source`` has no complete model.
        NonFiniteError: A weight is not finite.

    Example:
        >>> logits = bi.load_model("runs/digits")(images)
    """
    from .interchange.export import load_model as load

    model, _ = load(expand_path(source))
    return model.eval()


@overload
def evaluate(  # type: ignore[overload-overlap]  # a str is also a sequence of str
    source: str | Path,
    data: str | Path,
    *,
    batch_size: int = ...,
    probe: Literal["linear", "knn"] | None = ...,
    classes: ClassFiles = ...,
    per_class: bool = ...,
    split: str | Sequence[str] = ...,
    report: Callable[[str], None] = ...,
) -> dict[str, Any]: ...


@overload
def evaluate(
    source: str | Path,
    data: Sequence[str | Path],
    *,
    batch_size: int = ...,
    probe: Literal["linear", "knn"] | None = ...,
    classes: ClassFiles = ...,
    per_class: bool = ...,
    split: str | Sequence[str] = ...,
    report: Callable[[str], None] = ...,
) -> list[dict[str, Any]]: ...


def evaluate(
    source: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    batch_size: int = 256,
    probe: Literal["linear", "knn"] | None = None,
    classes: ClassFiles = None,
    per_class: bool = False,
    split: str | Sequence[str] = "val",
    report: Callable[[str], None] = _ignore,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Evaluate a finished model on prepared data, usually its validation split, in this process.

    Args:
        source: A run directory, the folder of a phase, an artifact, or an exported folder.
        data: A folder written by ``bigincubate data prepare``, or a list of them.
        batch_size: Batch size.
        probe: Evaluate the model's features instead, with a linear classifier or a nearest-neighbor classifier fitted
            on the training split.
        classes: A file that says which classes of the model the labels of the data mean, as ``--classes`` takes it; or
            a list with one, or None, for each data set.
        per_class: Whether to return the score of each class.
        split: The split: ``"val"``, ``"train"``, or ``"all"`` for both; or a list with one for each data set.
        report: Called with the scores of each data set in one line.

    Returns:
        A dict: the metrics of the task by name, such as ``top1`` in percent, and ``samples``. For classes of images,
        ``intervals`` has the ends of the 95% bootstrap intervals of ``top1`` and ``top5``. With ``per_class``,
        ``per_class`` has a dict for each class. For a list of data sets, a list of such dicts, each with ``data``.

    Raises:
        ArtifactError: ``source`` has no complete model.
        ConfigError: The data does not fit the model, or a file of classes is wrong.
        DataError: The data is missing or damaged.
        NonFiniteError: A weight or a metric is not finite.

    Example:
        >>> bi.evaluate("runs/digits", "runs/digits/data")["top1"]
        >>> [scores["top1"] for scores in bi.evaluate("runs/vit-b", ["data/imagenet", "data/sketch"])]
    """
    from .training.evaluation import evaluate_model

    one = isinstance(data, str | os.PathLike)
    paths = [data] if isinstance(data, str | os.PathLike) else list(data)
    results = []
    for found in evaluate_model(
        source, paths, batch_size=batch_size, probe=probe, classes=classes, per_class=per_class, split=split
    ):
        report(found.describe())
        results.append(found.values() if one else {"data": str(found.data), **found.values()})
    return results[0] if one else results
