"""Import weights as the meta model or modules of a run: of the official implementation, or of another run.

Checkpoints of the official implementation can also be converted to an exported model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..config import Recipe
from ..distributed.process_group import DistributedContext
from ..errors import ArtifactError, ConfigError, format_count
from ..files import hash_file
from ..interchange.export import with_weights, write_folder
from ..interchange.official_format import join_stages, read_stages
from ..models.base import Depths
from ..models.partition import Partition, show_depths
from ..models.surgery import extract
from ..planning.context import PhaseContext, open_run
from ..planning.phases import PhasePlan, Plan, make_plan, phase_model
from ..storage.artifacts import check_finite_weights, load_artifact
from ..storage.lease import NO_JOBS, JobQueue
from ..storage.run_directory import RunDir
from ..tasks.registry import make_task
from .builder import describe_model
from .run_phase import train_phase

Part = Literal["meta", "modules"]


def import_model(recipe: Recipe, files: Sequence[Path], out: Path) -> str:
    """Convert an official model to an exported folder, which `evaluate` and `export` accept.

    Position embeddings are resampled to the image size of the fine-tuning phase.

    Returns:
        Python code that loads the model.

    Raises:
        ArtifactError: A file is not an official checkpoint of the recipe's target model.
        ConfigError: The number of files or modules differs from the recipe's, or ``out`` has other files.
    """
    plan, settings = make_plan(recipe), recipe.settings("finetune")
    tensors = _read(files, plan, plan.target, "target")
    named, start = ", ".join(map(str, files)), _describe_files(_hash_files(files))
    spec = describe_model(make_task(settings, recipe.data), plan.target, initial_weights=start)
    model = phase_model(plan.row("finetune"), settings, plan.family, device="meta")
    return write_folder(with_weights(spec, plan.family.adapt_state(tensors, model), Path(named)), spec, out)


def import_part(
    recipe: Recipe, part: Part, files: Sequence[Path], run: RunDir, queue: JobQueue = NO_JOBS
) -> Iterator[tuple[PhaseContext, dict[str, Any]]]:
    """Import weights as the meta model or the modules of a run.

    Each phase trains for zero steps: it evaluates the weights and writes them as its artifact.

    Args:
        recipe: The recipe of the run.
        part: What to import.
        files: Official checkpoints: one, or one per module. Or one run directory; only its finished modules are
            imported, whatever settings and data they were trained with.
        run: The run to import into.
        queue: The batch system that may have started this process, for leases.

    Yields:
        The context and the result of each phase.

    Raises:
        ArtifactError: A file is not an official checkpoint, the run directory has no such finished phase, weights have
            other depths or shapes, or the modules are imported before the meta model.
        ConfigError: The number of files or modules differs from the recipe's, or a phase already has results.
        DataError: The run's data is missing.
    """
    plan = make_plan(recipe)
    wanted, what = (plan.meta, "meta model") if part == "meta" else (plan.target, "target")
    if plan.finished:
        raise ConfigError(
            f"--as {part}: finetune.init = {plan.finished!r} is a finished model, so the run has no meta model and no"
            " module; remove finetune.init"
        )
    rows = [plan.row("pretrain")] if part == "meta" else [row for row in plan.rows() if row.phase == "incubate"]
    if not rows:
        raise ConfigError('plan.incubate = "none": there is no module to import; list the modules to import in it')
    if len(files) == 1 and files[0].is_dir():
        tensors, sources = _read_run(RunDir(files[0]), rows, wanted, what)
        imported = {key: _describe_files({f"{files[0]}: {key}": digest}) for key, digest in sources.items()}
        rows = [row for row in rows if row.key in sources]
    else:
        tensors, sources = _read(files, plan, wanted, what), _hash_files(files)
        own = {row.key: files if row.module is None or len(files) == 1 else [files[row.module]] for row in rows}
        imported = {key: _describe_files({str(file): sources[str(file)] for file in own[key]}) for key in own}
    opened = open_run(recipe, run)
    for row in rows:
        folder = run.phase(row.phase, row.module)
        if folder.result or (folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())):
            raise ConfigError(f"{folder.path} already has results or checkpoints; import into another run directory")
    env = DistributedContext.single_process()
    try:
        for row in rows:
            module_tensors = (
                tensors if row.module is None else extract(tensors, Partition(plan.family, plan.target), row.module)
            )
            context = opened.phase(row.phase, row.module, env)
            run.log_event("imported", phase=row.key, source=imported[row.key])
            context = replace(context, planned=replace(context.planned, steps=0), imported=imported[row.key])
            yield context, train_phase(context, module_tensors, queue=queue)
    finally:
        env.close()


def _hash_files(files: Sequence[Path]) -> dict[str, str]:
    return {str(file): hash_file(file) for file in files}


def _describe_files(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{file} (SHA-256 {digest})" for file, digest in digests.items())


def _read(files: Sequence[Path], plan: Plan, wanted: Depths, what: str) -> dict[str, Tensor]:
    """Return all modules of one file, or module k of file k, as one model under timm's names."""
    if len(files) not in (1, plan.modules):
        raise ConfigError(
            f"{format_count(len(files), 'file')}: pass one file with all {plan.modules} modules, or one file per module"
        )
    lists = [read_stages(file) for file in files]
    for file, stages in zip(files, lists, strict=True):
        if len(stages) != plan.modules:
            raise ArtifactError(f"{file} has {format_count(len(stages), 'module')}, but the recipe has {plan.modules}")
    stages = [lists[module if len(files) > 1 else 0][module] for module in range(plan.modules)]
    found = tuple(plan.family.count_blocks(stage) for stage in stages)
    if found != wanted:
        blocks, expected = show_depths(found), show_depths(wanted)
        raise ArtifactError(f"{files[0]} has modules of {blocks} blocks, but the recipe's {what} has {expected}")
    tensors = join_stages(stages, plan.family)
    check_finite_weights(tensors, " or ".join(map(str, files)))
    return tensors


def _read_run(
    source: RunDir, rows: Sequence[PhasePlan], wanted: Depths, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the finished phases of a run, under their names in the model, and the digest of each phase.

    Raises:
        ArtifactError: None of the phases is finished, an artifact is damaged, or it has other depths.
    """
    source.load_recipe()
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for row in rows:
        folder = source.phase(row.phase, row.module)
        if folder.result is None:
            continue
        found, manifest = load_artifact(folder.artifact)
        if (depths := tuple(map(tuple, manifest.model.depths))) != wanted:
            raise ArtifactError(
                f"{folder.artifact} has modules of {show_depths(depths)} blocks, but the recipe's {what} has"
                f" {show_depths(wanted)}"
            )
        tensors |= found
        digests[row.key] = manifest.digest
    if not digests:
        raise ArtifactError(f"{source.path} has no finished {'meta model' if what == 'meta model' else 'modules'}")
    return tensors, digests
