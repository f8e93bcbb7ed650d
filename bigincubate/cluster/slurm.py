"""A run on Slurm: what is missing is submitted, and after it a *gate*, a small job that looks again.

::

    pretrain ──afterany──▶ incubate (array, a task a module) ──afterany──▶ gate ──▶ finetune ──afterany──▶ gate

The gate calls :func:`advance`, as ``submit`` and ``resume`` do: one function, which looks at what is there (lineage and
hashes), at what is in the queue, and submits the rest. So nothing waits on a job that cannot end well, no large
allocation is asked for before the modules are there, and submitting again is safe. How often a phase was submitted is
written down before each ``sbatch``; after ``slurm.rounds`` times a person must look.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..checkpoint.lock import owned
from ..checkpoint.store import check_module, load_manifest
from ..config import Recipe, SlurmJob
from ..errors import ArtifactError, ConfigError, EnvironmentFault
from ..files import read_json, write_json
from ..rundir import RunDir
from .env import RunEnv
from .local import Job

# option of sbatch for a key of SlurmJob; the rest is spelled alike
OPTIONS = {"ranks": "ntasks-per-node", "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem"}
NAME = "bigincubate-"
ENDED = ("COMPLETING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


@dataclass(frozen=True)
class Queued:
    """A job or an array task of this run that has not ended."""

    job: str  # of an array: the array's
    kind: str
    module: int | None
    state: str
    node: str
    reason: str

    @property
    def key(self) -> str:
        return self.kind if self.module is None else f"{self.kind}/{self.module}"


def queue(run: RunDir) -> list[Queued]:
    """What of this run is in the queue; known by its name and by the run directory in its comment.

    Raises:
        EnvironmentFault: Slurm does not answer.
    """
    found = []
    for line in _slurm("squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T|%j|%N|%r|%k").splitlines():
        job, index, state, name, node, reason, comment = line.split("|", 6)
        if comment == _comment(run) and name.startswith(NAME) and state not in ENDED:
            kind = name.removeprefix(NAME)
            found.append(Queued(job, kind, int(index) if kind == "incubate" else None, state, node, reason))
    return found


def advance(
    recipe: Recipe,
    graph: Sequence[Job],
    run: RunDir,
    *,
    data: str,
    gate: str | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Submit what is missing and not in the queue, and a gate after it. Gives whether everything is done.

    Args:
        data: the data set's digest.
        gate: the id of the job that calls, where a gate does; a person's call forgets how often phases were submitted.

    Raises:
        ArtifactError: a phase was submitted as often as it may be.
        LockedError: another process is submitting.
    """
    with owned(run.path / "slurm", RunEnv()):
        rounds: dict[str, int] = _book(run)["rounds"] if gate else {}
        missing = [job for job in graph if not _good(job, recipe, run, data)]
        if not missing:
            return True
        queued = [entry for entry in queue(run) if entry.job != gate]
        active = {entry.key: entry.job for entry in queued}
        stuck = [job for job in missing if job.key not in active and rounds.get(job.key, 0) >= recipe.slurm.rounds]
        wanted = [job for job in missing if job.key not in active and job not in stuck]
        wanted = [
            job for job in wanted if job.phase != "finetune" or all(other.phase != "incubate" for other in missing)
        ]
        if gate and not recipe.slurm.self_submit:
            say(f"missing: {', '.join(job.title for job in missing)}; go on with: bigincubate resume {run.path}")
            return False
        for phase in ("pretrain", "incubate", "finetune", "end_to_end"):
            jobs = [job for job in wanted if job.phase == phase]
            if jobs:
                rounds |= {job.key: rounds.get(job.key, 0) + 1 for job in jobs}
                needs = [active["pretrain"]] if phase == "incubate" and "pretrain" in active else []
                active |= dict.fromkeys((job.key for job in jobs), _submit(recipe, run, jobs, needs, rounds, say))
        waited = sorted({job for key, job in active.items() if key != "gate"}, key=int)
        if waited and "gate" not in active:
            _submit(recipe, run, [], waited, rounds, say)
        if not waited:
            words = "; ".join(f"{job.title}: submitted {rounds[job.key]} times{_last_error(job, run)}" for job in stuck)
            raise ArtifactError(f"given up: {words}. See why, then: bigincubate resume {run.path}")
        if not wanted:
            say(f"in the queue already: {', '.join(waited)}")
    return False


def sbatch(
    recipe: Recipe, run: RunDir, kind: str, *, modules: Sequence[int] = (), needs: Sequence[str] = ()
) -> list[str]:
    """The command that submits a job, word by word.

    Raises:
        ConfigError: a word has a control character, with which it could become a line of a script.
    """
    slurm, job = recipe.slurm, recipe.slurm.job(kind)
    logs = run.path.absolute() / "slurm"
    words = ["sbatch", "--parsable", f"--job-name={NAME}{kind}", f"--comment={_comment(run)}"]
    words += [f"--output={logs / ('%x_%A_%a.out' if modules else '%x_%j.out')}"]
    for key in SlurmJob.model_fields:
        value = getattr(job, key)
        if key != "extra" and value not in (None, 0):
            words.append(f"--{OPTIONS.get(key, key)}={value}")
    words += job.extra
    if modules:
        limit = f"%{slurm.concurrency}" if slurm.concurrency else ""
        words.append(f"--array={','.join(map(str, modules))}{limit}")
    if needs:
        words.append(f"--dependency=afterany:{':'.join(needs)}")
    words.append(str(script(kind)))
    words += (
        [str(run.path.absolute())]
        if kind == "gate"
        else [
            str(run.recipe_file.absolute()),
            str(run.path.absolute()),
        ]
    )
    for word in words:
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in word):
            raise ConfigError(f"a control character in {word!r}, which goes to sbatch; take it out")
    return words


def show(recipe: Recipe, run: RunDir, modules: int, *, baseline: bool) -> str:
    """Commands and scripts of a whole run, none of which has been submitted."""
    kinds = ["pretrain", "incubate", "gate", "finetune", *(["end_to_end"] if baseline else [])]
    before = {"incubate": ["PRETRAIN"], "gate": ["INCUBATE"]}
    parts = [f"# from the environment: {shlex.join(f'{k}={v}' for k, v in environment(recipe).items())}"]
    for kind in kinds:
        indices = range(modules) if kind == "incubate" else ()
        parts.append(shlex.join(sbatch(recipe, run, kind, modules=indices, needs=before.get(kind, ()))))
    parts += [f"\n# ---- {script(kind).name}\n{script(kind).read_text()}" for kind in kinds]
    return "\n".join(parts)


def script(kind: str) -> Path:
    """The script of a kind of job: pretrain, incubate, finetune, end_to_end, gate."""
    return Path(str(resources.files("bigincubate") / "sbatch" / f"{kind}.sbatch"))


def environment(recipe: Recipe) -> dict[str, str]:
    """What the scripts read from the environment."""
    slurm = recipe.slurm
    values = {
        "PYTHON": slurm.python or sys.executable,
        "BIGINCUBATE_PRELUDE": slurm.prelude,
        "BIGINCUBATE_CONTAINER": slurm.container,
        "BIGINCUBATE_RESTARTS": str(slurm.restarts),
    }
    return {key: value for key, value in values.items() if value is not None}


def cancel(run: RunDir) -> list[str]:
    """Take everything of this run out of the queue, gates first; what runs gets its signal and writes a checkpoint.
    Gives the ids."""
    ids = [entry.job for entry in sorted(queue(run), key=lambda entry: entry.kind != "gate")]
    ids = list(dict.fromkeys(ids))
    if ids:
        _slurm("scancel", *ids)
        run.note("cancelled", jobs=ids)
    return ids


def _submit(
    recipe: Recipe,
    run: RunDir,
    jobs: Sequence[Job],
    needs: Sequence[str],
    rounds: dict[str, int],
    say: Callable[[str], None],
) -> str:
    kind = jobs[0].phase if jobs else "gate"
    modules = [job.module for job in jobs if job.module is not None]
    book = _book(run) | {"rounds": rounds}
    write_json(run.path / "jobs.json", book)  # before sbatch: a count that is lost could go on for ever
    # a gate's own job must not leak into those that it submits
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    command = sbatch(recipe, run, kind, modules=modules, needs=needs)
    number = _slurm(*command, env=clean | environment(recipe)).partition(";")[0]
    entry = {"job": number, "kind": kind, "modules": modules, "needs": list(needs), "time": time.time()}
    write_json(run.path / "jobs.json", {**book, "jobs": [*book["jobs"], entry]})
    run.note("submitted", **entry)
    which = f" of modules {', '.join(map(str, modules))}" if modules else ""
    after = f", after {', '.join(needs)}" if needs else ""
    say(f"{kind}{which}: job {number}{after}")
    return number


def _good(job: Job, recipe: Recipe, run: RunDir, data: str) -> bool:
    """Whether a phase is done and what it hands on is sound. What is not is forgotten, to be made again."""
    folder = run.phase(job.phase, job.module)
    if folder.result is None:
        return False
    if job.phase == "incubate":
        try:
            meta = load_manifest(run.phase("pretrain").artifact).digest
        except ArtifactError:
            return False
        problem = check_module(folder.artifact, recipe=recipe.digest, meta=meta, data=data)
        if problem:
            run.note("made_again", phase=job.key, reason=problem)
            (folder.path / "DONE").unlink()
            return False
    return True


def _last_error(job: Job, run: RunDir) -> str:
    attempts = run.phase(job.phase, job.module).attempts()
    error = attempts[-1].get("error") if attempts else None
    return f" ({error})" if error else ""


def _book(run: RunDir) -> dict[str, Any]:
    return {"jobs": [], "rounds": {}, **(read_json(run.path / "jobs.json") or {})}


def _comment(run: RunDir) -> str:
    return str(run.path.resolve())


def _slurm(*words: str, env: dict[str, str] | None = None) -> str:
    if shutil.which(words[0]) is None:
        raise EnvironmentFault(f"{words[0]} is not there: this needs Slurm; without it, use `bigincubate run`")
    ended = subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=120)
    if ended.returncode:
        raise EnvironmentFault(f"{words[0]} failed: {ended.stderr.strip().splitlines()[-1:] or ended.returncode}")
    return ended.stdout.strip()
