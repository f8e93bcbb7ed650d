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
from .client import DEFAULT_MAX_ARRAY_SIZE, job_name, run_comment

# options of sbatch whose name differs from the key in `SlurmJobConfig`
OPTION_NAMES = {"ranks": "ntasks-per-node", "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem"}


def build_sbatch_command(
    recipe: Recipe, run: RunDir, kind: str, *, modules: Sequence[int] = (), offset: int = 0, needs: Sequence[str] = ()
) -> list[str]:
    """Return the command that submits a job, as a list of words.

    Args:
        recipe: The recipe of the run.
        run: The run directory.
        kind: ``pretrain``, ``incubate``, ``finetune``, ``end_to_end`` or ``gate``.
        modules: The modules of an array.
        offset: Difference between the number of a module and its index in the array.
        needs: Ids of jobs that must have ended first, successfully or not.

    Raises:
        ConfigError: If a word contains a control character, which could start a new line of a script.
    """
    slurm, job, path = recipe.slurm, recipe.slurm.job(kind), run.path.absolute()
    words = ["sbatch", "--parsable", f"--job-name={job_name(kind, offset)}", f"--comment={run_comment(run)}"]
    words.append(f"--output={path / 'slurm' / ('%x_%A_%a.out' if modules else '%x_%j.out')}")
    for key in SlurmJobConfig.model_fields:
        value = getattr(job, key)
        if key != "extra" and value not in (None, 0):
            words.append(f"--{OPTION_NAMES.get(key, key)}={value}")
    words += job.extra
    if modules:
        limit = f"%{slurm.array_parallelism}" if slurm.array_parallelism else ""
        words.append(f"--array={','.join(str(module - offset) for module in modules)}{limit}")
    if needs:
        words.append(f"--dependency=afterany:{':'.join(needs)}")
    words += [str(find_script(kind)), *script_variables(recipe, offset)]
    words += [str(path)] if kind == "gate" else [str(run.recipe_file.absolute()), str(path)]
    for word in words:
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in word):
            raise ConfigError(f"a control character in {word!r}, which is passed to sbatch; remove the character")
    return words


def split_into_arrays(modules: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Split modules into job arrays.

    Args:
        modules: Numbers of the modules.
        size: Maximum number of indices of an array.

    Yields:
        The offset and the modules of an array. The index of a module in the array is its number minus the offset.
    """
    for offset in sorted({module // size * size for module in modules}):
        yield offset, [module for module in modules if module // size * size == offset]


def find_script(kind: str) -> Path:
    """Return the script of a kind of job: ``pretrain``, ``incubate``, ``finetune``, ``end_to_end`` or ``gate``."""
    return resource_folder("slurm") / f"{kind}.sbatch"


def script_variables(recipe: Recipe, offset: int = 0) -> list[str]:
    """Return the variables that the scripts read, as arguments ``NAME=VALUE``.

    They are not passed in the environment, because sites may configure ``sbatch`` to give jobs none.

    Args:
        recipe: The recipe of the run.
        offset: Difference between the number of a module and its index in the array.
    """
    slurm, search_path = recipe.slurm, os.environ.get("PYTHONPATH")
    values = {
        "PYTHON": slurm.python or sys.executable,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, search_path.split(os.pathsep))) if search_path else None,
        "BIGINCUBATE_SETUP_SCRIPT": slurm.setup_script,
        "BIGINCUBATE_CONTAINER": slurm.container,
        "BIGINCUBATE_MAX_REQUEUES": str(slurm.max_requeues),
        "BIGINCUBATE_OFFSET": str(offset) if offset else None,
        LEVEL_VARIABLE: os.environ.get(LEVEL_VARIABLE),
    }
    return [f"{name}={value}" for name, value in values.items() if value is not None]


def format_submission(
    recipe: Recipe, run: RunDir, modules: int, *, baseline: bool, size: int = DEFAULT_MAX_ARRAY_SIZE
) -> str:
    """Return the commands and scripts of a whole run as text, without submitting them.

    Args:
        recipe: The recipe of the run.
        run: The run directory; it need not exist.
        modules: Number of modules.
        baseline: Whether to include the end-to-end baseline.
        size: Slurm's MaxArraySize.
    """
    kinds = ["pretrain", "incubate", "gate", "finetune", *(["end_to_end"] if baseline else [])]
    before = {"incubate": ["PRETRAIN"], "gate": ["INCUBATE"]}
    parts = []
    for kind in kinds:
        for offset, group in split_into_arrays(range(modules), size) if kind == "incubate" else [(0, list[int]())]:
            words = build_sbatch_command(recipe, run, kind, modules=group, offset=offset, needs=before.get(kind, ()))
            parts.append(shlex.join(words))
    parts += [f"\n# ---- {find_script(kind).name}\n{find_script(kind).read_text()}" for kind in kinds]
    return "\n".join(parts)
