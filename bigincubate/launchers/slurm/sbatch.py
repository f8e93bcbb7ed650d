"""Build the ``sbatch`` commands of a run, with the scripts and their arguments."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...config import Recipe, SlurmJobConfig
from ...config.resources import resource_folder
from ...distributed.rank_logging import LEVEL_VARIABLE
from ...errors import ConfigError
from ...storage.run_directory import RunDir
from .client import DEFAULT_MAX_ARRAY_SIZE
from .job_logs import LOG_PREFIX
from .submission_log import job_name, run_comment

# options of sbatch whose name differs from the key in `SlurmJobConfig`
OPTION_NAMES = {"ranks": "ntasks-per-node", "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem"}
# options in `extra` that replace a key
REPLACED_BY = {
    "nodes": ("--ntasks",),
    "ranks": ("--ntasks",),
    "memory": ("--mem-per-gpu", "--mem-per-cpu"),
    "gpus": ("--gres", "--gpus", "--gpus-per-task"),
}


def build_sbatch_command(
    recipe: Recipe,
    run: RunDir,
    kind: str,
    *,
    modules: Sequence[int] = (),
    offset: int = 0,
    after: Sequence[str] = (),
    after_success: Sequence[str] = (),
    cluster: str | None = None,
) -> list[str]:
    """Return the command that submits a job, as a list of words.

    Args:
        recipe: The recipe of the run.
        run: The run directory.
        kind: ``pretrain``, ``incubate``, ``finetune``, ``end_to_end`` or ``gate``.
        modules: The modules of an array. None for a job of one module, whose number is the offset.
        offset: Difference between the number of a module and its index in the array.
        after: Ids of jobs that must have ended first, successfully or not.
        after_success: Ids of jobs that must have succeeded. If one fails, Slurm cancels this job.
        cluster: The cluster to submit to, instead of ``--clusters`` in the recipe.

    Raises:
        ConfigError: If a word contains a control character, which could start a new line of a script.
    """
    slurm, job, path = recipe.slurm, recipe.slurm.job(kind), run.path.absolute()
    words = ["sbatch", "--parsable", f"--job-name={job_name(run, kind, offset)}", f"--comment={run_comment(run)}"]
    log = f"{LOG_PREFIX}{kind}{f'+{offset}' if offset else ''}_{'%A_%a' if modules else '%j'}.out"
    words.append(f"--output={str(path).replace('%', '%%')}/slurm/{log}")
    given = {word.partition("=")[0] for word in job.extra}
    for key in SlurmJobConfig.model_fields:
        value, option = getattr(job, key), f"--{OPTION_NAMES.get(key, key)}"
        if key != "extra" and value not in (None, 0) and not given & {option, *REPLACED_BY.get(key, ())}:
            words.append(f"{option}={value}")
    words += [option for option in job.extra if cluster is None or not option.startswith("--clusters=")]
    if cluster is not None:
        words.append(f"--clusters={cluster}")
    if modules:
        limit = f"%{slurm.array_parallelism}" if slurm.array_parallelism else ""
        words.append(f"--array={','.join(str(module - offset) for module in modules)}{limit}")
    needs = [f"{how}:{':'.join(ids)}" for how, ids in (("afterok", after_success), ("afterany", after)) if ids]
    if needs:
        words.append(f"--dependency={','.join(needs)}")
    if after_success:
        words.append("--kill-on-invalid-dep=yes")
    words += [str(find_script(kind)), *script_variables(recipe, kind, offset)]
    if "\\" in str(path):
        raise ConfigError(f"{path}: Slurm cannot write logs to a path with a backslash; use another --run-dir")
    words += [str(path)] if kind == "gate" else [kind, str(run.recipe_file.absolute()), str(path)]
    for word in words:
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in word):
            raise ConfigError(f"a control character in {word!r}, which is passed to sbatch; remove the character")
    return words


def split_into_arrays(modules: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Split modules into job arrays.

    Args:
        modules: Numbers of the modules.
        size: Maximum number of indices of an array; 0 if there are no arrays: each module is a job of its own.

    Yields:
        The offset and the modules of an array. The index of a module in the array is its number minus the offset.
    """
    size = size or 1
    for offset in sorted({module // size * size for module in modules}):
        yield offset, [module for module in modules if module // size * size == offset]


def find_script(kind: str) -> Path:
    """Return the script of a kind of job: ``pretrain``, ``incubate``, ``finetune``, ``end_to_end`` or ``gate``."""
    return resource_folder("slurm") / ("gate.sbatch" if kind == "gate" else "phase.sbatch")


def script_variables(recipe: Recipe, kind: str, offset: int = 0) -> list[str]:
    """Return the variables that the scripts read, as arguments ``NAME=VALUE``.

    They are not passed in the environment, because sites may configure ``sbatch`` to give jobs none.

    Args:
        recipe: The recipe of the run.
        kind: Kind of the job.
        offset: Difference between the number of a module and its index in the array.
    """
    slurm, search_path = recipe.slurm, os.environ.get("PYTHONPATH")
    phase = kind != "gate"
    values = {
        "PYTHON": slurm.python or sys.executable,
        "BIGINCUBATE_HOST_PYTHON": slurm.host_python or (sys.executable if slurm.in_container else None),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, search_path.split(os.pathsep))) if search_path else None,
        "BIGINCUBATE_SETUP_SCRIPT": slurm.setup_script,
        "BIGINCUBATE_CONTAINER": slurm.container if phase else None,
        "BIGINCUBATE_MAX_REQUEUES": str(slurm.max_requeues),
        "BIGINCUBATE_OFFSET": str(offset) if kind == "incubate" else None,
        LEVEL_VARIABLE: os.environ.get(LEVEL_VARIABLE),
    }
    options = [f"SRUN={option}" for option in slurm.srun] if phase else []
    return [*(f"{name}={value}" for name, value in values.items() if value is not None), *options]


def format_submission(
    recipe: Recipe, run: RunDir, modules: Sequence[int], *, baseline: bool, size: int = DEFAULT_MAX_ARRAY_SIZE
) -> str:
    """Return the commands and scripts of a whole run as text, without submitting them.

    Args:
        recipe: The recipe of the run.
        run: The run directory; it need not exist.
        modules: Numbers of the modules that are incubated.
        baseline: Whether to include the end-to-end baseline.
        size: Slurm's MaxArraySize.
    """
    commands = list(plan_submission(recipe, run, modules, baseline=baseline, size=size))
    parts = [shlex.join(words) for _, words in commands]
    scripts = dict.fromkeys(find_script(kind) for kind, _ in commands)
    parts += [f"\n# ---- {script.name}\n{script.read_text()}" for script in scripts]
    return "\n".join(parts)


def plan_submission(
    recipe: Recipe, run: RunDir, modules: Sequence[int], *, baseline: bool, size: int = DEFAULT_MAX_ARRAY_SIZE
) -> Iterator[tuple[str, list[str]]]:
    """Yield the kinds and the commands of a whole run, with names in place of the ids of other jobs.

    Args:
        recipe: The recipe of the run.
        run: The run directory; it need not exist.
        modules: Numbers of the modules that are incubated.
        baseline: Whether to include the end-to-end baseline.
        size: Slurm's MaxArraySize.
    """
    if recipe.finetune.init:  # no phase needs another one
        kinds = ["finetune", *(["end_to_end"] if baseline else [])]
        for kind in kinds:
            yield kind, build_sbatch_command(recipe, run, kind)
        yield "gate", build_sbatch_command(recipe, run, "gate", after=[kind.upper() for kind in kinds])
        return
    yield "pretrain", build_sbatch_command(recipe, run, "pretrain")
    for offset, group in split_into_arrays(modules, size):
        yield (
            "incubate",
            build_sbatch_command(
                recipe, run, "incubate", modules=group if size else (), offset=offset, after_success=["PRETRAIN"]
            ),
        )
    yield "gate", build_sbatch_command(recipe, run, "gate", after=["PRETRAIN", *(["INCUBATE"] if modules else [])])
    yield "finetune", build_sbatch_command(recipe, run, "finetune")
    if baseline:
        yield "end_to_end", build_sbatch_command(recipe, run, "end_to_end")
