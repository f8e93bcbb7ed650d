"""Everything in a run directory held against its hashes and its origin: what is good, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from .checkpoint.lock import owner
from .checkpoint.offline import survey
from .checkpoint.store import check_origin, load_manifest, verify_artifact
from .config import Recipe
from .data.dataset import damaged_shards, open_dataset
from .errors import ArtifactError, EnvironmentFault
from .files import read_json
from .rundir import PhaseDir, RunDir
from .workflow import data_path


class Verdict(StrEnum):
    GOOD = "good"
    DAMAGED = "damaged"  # not what was written
    STALE = "stale"  # sound, and grown from something that this run no longer has
    RUNNING = "in progress"  # its owner is alive
    UNFINISHED = "unfinished"  # left by an attempt that ended; the next one clears it away
    ABSENT = "not there yet"


@dataclass(frozen=True)
class Finding:
    part: str  # data, or a phase's key
    path: Path
    verdict: Verdict
    why: str = ""


def verify_run(run: RunDir, *, everything: bool = True) -> Iterator[Finding]:
    """Every file that something is handed on by: data, artifacts, results, resume checkpoints. All of them are read.

    Args:
        everything: else artifacts and results alone, which are small beside data and checkpoints.

    Raises:
        ArtifactError: not a run directory, or nothing has been planned in it yet.
    """
    recipe, plan = run.recipe(), read_json(run.path / "plan.json")
    if plan is None or not {"rows", "data"} <= plan.keys():
        raise ArtifactError(f"nothing has run in {run.path} yet")
    if everything:
        yield from _data(recipe, run, plan["data"])
    for row in plan["rows"]:
        folder = run.phase(row["phase"], row["module"])
        own = row["module"] is not None and plan.get("parts")
        seen = own[row["module"]] if own else plan["data"]
        if folder.path.exists() or row["phase"] != "end_to_end":  # a baseline that nobody asked for
            yield from _phase(row["key"], folder, recipe, run, seen)
            if everything:
                yield from _checkpoints(row["key"], folder)
    if run.assembled.path.exists():
        yield _artifact("assembled", run.assembled, recipe, run, plan["data"])


def _data(recipe: Recipe, run: RunDir, digest: str) -> Iterator[Finding]:
    path = data_path(recipe, run)
    try:
        info = open_dataset(path, recipe.data.remote)
    except EnvironmentFault as error:
        yield Finding("data", path, Verdict.DAMAGED, str(error))
        return
    if info.digest != digest:
        yield Finding("data", path, Verdict.STALE, f"{info.digest[:12]}…, the run was made with {digest[:12]}…")
        return
    found = [Finding("data", file, Verdict.DAMAGED, why) for file, why in damaged_shards(info)]
    yield from found or [Finding("data", path, Verdict.GOOD)]


def _phase(key: str, folder: PhaseDir, recipe: Recipe, run: RunDir, data: str) -> Iterator[Finding]:
    alive = owner(folder.path)
    result = folder.path / "DONE"
    if result.exists():
        sound = folder.result is not None
        why = "" if sound else "holds no result; the phase would begin anew from its last checkpoint"
        yield Finding(key, result, Verdict.GOOD if sound else Verdict.DAMAGED, why)
        yield _artifact(key, folder, recipe, run, data)
    elif alive:
        yield Finding(key, folder.path, Verdict.RUNNING, alive)
    else:
        yield Finding(key, folder.path, Verdict.UNFINISHED if folder.attempts() else Verdict.ABSENT)


def _checkpoints(key: str, folder: PhaseDir) -> Iterator[Finding]:
    alive = owner(folder.path)
    for row in survey(folder.path) if folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir()) else []:
        verdict, why = Verdict.GOOD, ""
        if not row["committed"]:
            verdict = Verdict.RUNNING if alive else Verdict.UNFINISHED
        elif row["problem"]:
            verdict, why = Verdict.DAMAGED, row["problem"]
        yield Finding(key, Path(row["path"]), verdict, why)


def _artifact(key: str, folder: PhaseDir, recipe: Recipe, run: RunDir, data: str) -> Finding:
    try:
        manifest = verify_artifact(folder.artifact)
    except ArtifactError as error:
        return Finding(key, folder.artifact, Verdict.DAMAGED, str(error))
    meta = None
    if key not in ("pretrain", "end_to_end"):
        try:
            meta = load_manifest(run.phase("pretrain").artifact).digest
        except ArtifactError as error:
            return Finding(key, folder.artifact, Verdict.STALE, f"its meta model cannot be read: {error}")
    problem = check_origin(manifest, recipe=recipe.digest, meta=meta, data=data)
    return Finding(key, folder.artifact, Verdict.STALE if problem else Verdict.GOOD, problem or "")
