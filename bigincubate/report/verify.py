"""Verify a run directory: compare the hash and the lineage of every file with the recorded ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..data.dataset import open_dataset
from ..data.verification import find_damaged_shards
from ..errors import ArtifactError, DataError
from ..launchers.slurm.job_queue import SlurmQueue
from ..planning.lineage import expected_lineage, phase_inputs
from ..storage.artifacts import Lineage, check_lineage, verify_artifact
from ..storage.checkpoint_tools import list_checkpoints
from ..storage.lease import current_owner
from ..storage.run_directory import PhaseDir, RunDir
from .status import read_plan


class Verdict(StrEnum):
    """The state of a part of a run directory.

    Attributes:
        GOOD: The files match their hashes.
        DAMAGED: The files do not match their hashes.
        STALE: The files are valid, but were computed from data or a model that this run no longer has.
        RUNNING: A process is writing the files.
        UNFINISHED: The files are from an interrupted attempt; the next attempt removes them or resumes from them.
        ABSENT: The files do not exist yet.
    """

    GOOD = "good"
    DAMAGED = "damaged"
    STALE = "stale"
    RUNNING = "in progress"
    UNFINISHED = "unfinished"
    ABSENT = "missing"


@dataclass(frozen=True)
class Finding:
    """The result of verifying one file or folder.

    Attributes:
        part: ``data``, ``assembled``, or the key of a phase.
        path: The file or folder.
        verdict: Its state.
        why: The reason for the verdict.
    """

    part: str
    path: Path
    verdict: Verdict
    why: str = ""


def verify_run(run: RunDir, *, everything: bool = True) -> Iterator[Finding]:
    """Verify data, artifacts, results and resume checkpoints by reading all their files.

    Args:
        run: The run directory.
        everything: Whether to verify also data and checkpoints, which are much larger than artifacts and results.

    Yields:
        A finding per file or folder.

    Raises:
        ArtifactError: This is not a run directory, or it has no plan yet, or the plan is damaged.
    """
    recipe, plan = run.load_recipe(), read_plan(run)
    if everything:
        yield from _data(recipe, run, plan["data"])
    stale: dict[str, str] = {}
    for row in plan["rows"]:
        folder = run.phase(row["phase"], row["module"])
        if folder.path.exists() or row["phase"] != "end_to_end":  # the baseline may not have been requested
            yield from _phase(run, row, folder, stale)
            if everything:
                yield from _checkpoints(row["key"], folder)
    if run.assembled.path.exists():
        yield _artifact(run, next(row for row in plan["rows"] if row["key"] == "finetune"), run.assembled, stale)


def _data(recipe: Recipe, run: RunDir, digest: str) -> Iterator[Finding]:
    path = run.data_path(recipe)
    try:
        info = open_dataset(path, recipe.data.remote)
    except DataError as error:
        yield Finding("data", path, Verdict.DAMAGED, str(error))
        return
    if info.digest != digest:
        yield Finding("data", path, Verdict.STALE, f"digest {info.digest[:12]}…, but the run uses {digest[:12]}…")
        return
    found = [Finding("data", file, Verdict.DAMAGED, why) for file, why in find_damaged_shards(info)]
    yield from found or [Finding("data", path, Verdict.GOOD)]


def _phase(run: RunDir, row: dict[str, Any], folder: PhaseDir, stale: dict[str, str]) -> Iterator[Finding]:
    key, alive = row["key"], current_owner(folder.path, SlurmQueue())
    result = folder.path / "DONE"
    if result.exists():
        valid = folder.result is not None
        why = "" if valid else "has no valid result; the phase would resume from its last checkpoint"
        yield Finding(key, result, Verdict.GOOD if valid else Verdict.DAMAGED, why)
        yield (found := _artifact(run, row, folder, stale))
        if found.verdict is Verdict.STALE:
            stale[key] = found.why
    elif alive:
        yield Finding(key, folder.path, Verdict.RUNNING, alive)
    else:
        yield Finding(key, folder.path, Verdict.UNFINISHED if folder.read_attempts() else Verdict.ABSENT)


def _checkpoints(key: str, folder: PhaseDir) -> Iterator[Finding]:
    alive = current_owner(folder.path, SlurmQueue())
    if not folder.checkpoints.is_dir() or not any(folder.checkpoints.iterdir()):
        return
    for row in list_checkpoints(folder.path):
        verdict, why = Verdict.GOOD, ""
        if not row["committed"]:
            verdict = Verdict.RUNNING if alive else Verdict.UNFINISHED
        elif row["problem"]:
            verdict, why = Verdict.DAMAGED, row["problem"]
        yield Finding(key, Path(row["path"]), verdict, why)


def _artifact(run: RunDir, row: dict[str, Any], folder: PhaseDir, stale: dict[str, str]) -> Finding:
    """Verify an artifact of a phase.

    Args:
        run: The run directory.
        row: The row of the phase in ``plan.json``.
        folder: The folder of the phase.
        stale: Reasons why artifacts of earlier phases are stale, by phase key.
    """
    key = "assembled" if folder == run.assembled else row["key"]
    try:
        manifest = verify_artifact(folder.artifact)
    except ArtifactError as error:
        return Finding(key, folder.artifact, Verdict.DAMAGED, str(error))
    try:
        expected = expected_lineage(run, row["phase"], row["module"])
    except ArtifactError:  # an input artifact is missing or damaged, which is reported separately
        expected = Lineage(row["identity"], row["data"], manifest.inputs)
    problem = check_lineage(manifest, expected)
    for name, source in phase_inputs(row["identity"]).items():
        if problem is None and source.key in stale:
            problem = f"{name} is {stale[source.key]}"
    return Finding(key, folder.artifact, Verdict.STALE if problem else Verdict.GOOD, problem or "")
