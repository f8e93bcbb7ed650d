"""How a job is asked for: the words of ``sbatch``, the script, and what the script reads from the environment."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config import Recipe, SlurmJob
from ..errors import ConfigError
from ..resources import resource_folder
from ..rundir import RunDir
from .slurm import DEFAULT_ARRAY, comment, job_name

# option of sbatch for a key of SlurmJob; the rest is spelled alike
OPTIONS = {"ranks": "ntasks-per-node", "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem"}


def sbatch(
    recipe: Recipe, run: RunDir, kind: str, *, modules: Sequence[int] = (), offset: int = 0, needs: Sequence[str] = ()
) -> list[str]:
    """The command that submits a job, word by word.

    Args:
        modules: of an array.
        offset: subtracted from their numbers, which gives the array's indices.
        needs: ids of jobs that must have ended, well or not.

    Raises:
        ConfigError: a word has a control character, with which it could become a line of a script.
    """
    slurm, job, path = recipe.slurm, recipe.slurm.job(kind), run.path.absolute()
    words = ["sbatch", "--parsable", f"--job-name={job_name(kind, offset)}", f"--comment={comment(run)}"]
    words.append(f"--output={path / 'slurm' / ('%x_%A_%a.out' if modules else '%x_%j.out')}")
    for key in SlurmJob.model_fields:
        value = getattr(job, key)
        if key != "extra" and value not in (None, 0):
            words.append(f"--{OPTIONS.get(key, key)}={value}")
    words += job.extra
    if modules:
        limit = f"%{slurm.concurrency}" if slurm.concurrency else ""
        words.append(f"--array={','.join(str(module - offset) for module in modules)}{limit}")
    if needs:
        words.append(f"--dependency=afterany:{':'.join(needs)}")
    words.append(str(script(kind)))
    words += [str(path)] if kind == "gate" else [str(run.recipe_file.absolute()), str(path)]
    for word in [*words, *environment(recipe).values()]:
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in word):
            raise ConfigError(f"a control character in {word!r}, which goes to sbatch; take it out")
    return words


def arrays(modules: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Modules in groups that an array of ``size`` indices holds, each with its offset."""
    for offset in sorted({module // size * size for module in modules}):
        yield offset, [module for module in modules if module // size * size == offset]


def script(kind: str) -> Path:
    """The script of a kind of job: pretrain, incubate, finetune, end_to_end, gate."""
    return resource_folder("slurm") / f"{kind}.sbatch"


def environment(recipe: Recipe, offset: int = 0) -> dict[str, str]:
    """What the scripts read from the environment."""
    slurm = recipe.slurm
    values = {
        "PYTHON": slurm.python or sys.executable,
        "BIGINCUBATE_PRELUDE": slurm.prelude,
        "BIGINCUBATE_CONTAINER": slurm.container,
        "BIGINCUBATE_RESTARTS": str(slurm.restarts),
        "BIGINCUBATE_OFFSET": str(offset) if offset else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def show(recipe: Recipe, run: RunDir, modules: int, *, baseline: bool, size: int = DEFAULT_ARRAY) -> str:
    """Commands and scripts of a whole run, none of which has been submitted."""
    kinds = ["pretrain", "incubate", "gate", "finetune", *(["end_to_end"] if baseline else [])]
    before = {"incubate": ["PRETRAIN"], "gate": ["INCUBATE"]}
    parts = [f"# from the environment: {shlex.join(f'{k}={v}' for k, v in environment(recipe).items())}"]
    for kind in kinds:
        for offset, group in arrays(range(modules), size) if kind == "incubate" else [(0, list[int]())]:
            words = sbatch(recipe, run, kind, modules=group, offset=offset, needs=before.get(kind, ()))
            parts.append((f"BIGINCUBATE_OFFSET={offset} " if offset else "") + shlex.join(words))
    parts += [f"\n# ---- {script(kind).name}\n{script(kind).read_text()}" for kind in kinds]
    return "\n".join(parts)
