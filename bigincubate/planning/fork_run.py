"""Fork a run: a new run directory that takes over the phases of another run that a changed recipe leaves valid.

Artifacts, checkpoints and built-in data become hard links where the file system has them, because these files are never
changed in place. All other files are copied. The new run is built in a temporary folder next to its path and renamed
when it is complete.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..config import PHASES, Phase, Recipe, differences
from ..errors import ConfigError, LockedError, format_command, format_count
from ..files import (
    append_json_line,
    fsync_path,
    link_or_copy,
    read_json,
)
from ..storage.artifacts import check_artifact_lineage
from ..storage.checkpoint_verification import find_committed, verify_checkpoint
from ..storage.lease import NO_JOBS, JobQueue, current_owner, lease_generation
from ..storage.run_directory import PhaseDir, RunDir
from .identity import checkpoint_digest
from .lineage import expected_lineage, phase_inputs
from .planned_row import PlannedRow
from .prepare_run import ensure_data, ensure_plan

logger = logging.getLogger(__name__)

LINKED = ("artifact", "checkpoints")  # folders of a phase whose files are never changed in place
# what a run directory without trained phases may contain
UNTRAINED = {"recipe.toml", "plan.json", "events.jsonl", "summary.json", "report.html", "owners", "data", ".data.lock"}
UNTRAINED |= {"meta", "modules", "assembled", "finetune", "end_to_end", "fleet", "partial", "slurm", "jobs.json"}

# why an unfinished phase is not taken over, whatever keys of the recipe changed
NOT_TRAINED = "not trained yet"
ALL_DAMAGED = "every checkpoint is damaged"


@dataclass(frozen=True)
class ForkedPhase:
    """What happened to a phase of a run that was forked.

    Attributes:
        key: Key of the phase.
        title: Name of the phase in tables.
        taken: Whether the new run has its results or its checkpoints.
        reason: ``finished`` or ``unfinished, from step N`` if it was taken; otherwise why it has to be trained.
    """

    key: str
    title: str
    taken: bool
    reason: str


@dataclass(frozen=True)
class Fork:
    """A new run.

    Attributes:
        run: Its directory.
        phases: The phases.
        linked: Number of files that are hard links.
        copied: Number of bytes that were copied.
    """

    run: RunDir
    phases: tuple[ForkedPhase, ...]
    linked: int
    copied: int


def fork_run(
    source: RunDir,
    new: RunDir,
    recipe: Recipe | None = None,
    *,
    queue: JobQueue = NO_JOBS,
    report: Callable[[str], None] = lambda text: None,
) -> Fork:
    """Create a run that takes over the phases of ``source`` that ``recipe`` leaves valid. ``source`` is not changed.

    Args:
        source: The directory of the run; it may be read-only.
        new: The directory of the new run, which may be a run in which nothing has been trained.
        recipe: The recipe of the new run; by default that of ``source``.
        queue: The batch system, which is asked whether a job is training a phase.
        report: Called with a message before slow work.

    Raises:
        ArtifactError: ``source`` is not a run directory.
        ConfigError: ``new`` has trained phases or other files, or the recipe leaves no phase valid.
        LockedError: A process is training a phase of ``source``.
        OSError: A file of ``source`` cannot be read.
    """
    before = source.load_recipe()
    recipe = recipe or before
    _check_target(source, new)
    generations = _check_free(source, queue)
    new.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = RunDir(new.path.with_name(f".{new.path.name}.fork-{uuid.uuid4().hex[:8]}"))
    try:
        temporary.create(recipe)
        copier = _Copier()
        if recipe.data.path is None and (source.path / "data").is_dir():
            copier.copy_folder(source.path / "data", temporary.path / "data", link=True)
        data = ensure_data(recipe, temporary, report)
        _, rows = ensure_plan(recipe, temporary, data)
        phases: list[ForkedPhase] = []
        for row in rows:
            if row.phase != "end_to_end" or source.phase("end_to_end").path.exists():
                phases.append(_take_phase(source, temporary, row, phases, differences(before, recipe), copier))
        if not any(phase.taken for phase in phases):
            reasons = "; ".join(f"{phase.title}: {phase.reason}" for phase in phases[:2])
            run = format_command("run", "RECIPE", "--run-dir", new.path)
            raise ConfigError(f"no phase of {source.path} stays valid ({reasons}); use: {run}")
        temporary.update_summary()
        temporary.log_event("forked", source=str(source.path), phases=[asdict(phase) for phase in phases])
        if _check_free(source, queue) != generations:
            raise LockedError(f"{source.path}: a process began to train while the run was being forked; try again")
        _rename(temporary.path, new)
    finally:
        shutil.rmtree(temporary.path, ignore_errors=True)
    return Fork(new, tuple(phases), copier.linked, copier.copied)


def _check_target(source: RunDir, new: RunDir) -> None:
    """Check that the new run directory may be created.

    Raises:
        ConfigError: It has trained phases or other files, or is inside of the run to fork.
    """
    if new.path.resolve().is_relative_to(source.path.resolve()):
        raise ConfigError(f"{new.path} is inside of {source.path}; choose another directory")
    if not new.path.exists():
        return
    if not new.path.is_dir():
        raise ConfigError(f"{new.path} is a file; choose another path")
    if new.begun:
        raise ConfigError(f"{new.path} has trained phases; choose another directory, or remove it first")
    names = sorted(path.name for path in new.path.iterdir())
    if names and (not new.recipe_file.exists() or not UNTRAINED.issuperset(names)):
        others = [name for name in names if name not in UNTRAINED] or names
        raise ConfigError(f"{new.path} has other files ({', '.join(others[:3])}); choose another directory")


def _check_free(source: RunDir, queue: JobQueue) -> list[int]:
    """Check that no process is training a phase of a run, and return the numbers of leases so far.

    Raises:
        LockedError: A process is; the message names it.
    """
    for folder in source.phases:
        if owner := current_owner(folder.path, queue):
            raise LockedError(f"{folder.path} is being trained by {owner}; wait for it, or stop it first")
    return [lease_generation(folder.path) for folder in source.phases]


def _take_phase(
    source: RunDir, new: RunDir, row: PlannedRow, others: list[ForkedPhase], changes: list[str], copier: _Copier
) -> ForkedPhase:
    """Copy a phase if it is valid in the new run.

    Args:
        source: The run to fork.
        new: The new run, with its plan.
        row: The phase in the plan of the new run.
        others: The phases before it.
        changes: Changed keys of the recipe, such as ``train.lr: 0.001 -> 0.002``.
        copier: Copies files.
    """
    folder, target = source.phase(row.phase, row.module), new.phase(row.phase, row.module)

    def decide(taken: bool, reason: str) -> ForkedPhase:
        return ForkedPhase(row.key, row.title, taken, reason)

    inputs = {source.key for source in phase_inputs(row.identity).values()}
    if missing := [other.title for other in others if other.key in inputs and not _is_finished(other)]:
        return decide(False, f"needs {', '.join(missing)}")
    lineage = expected_lineage(new, row.phase, row.module)
    finished = folder.result is not None
    problem = check_artifact_lineage(folder.artifact, lineage) if finished else None
    committed = find_committed(folder.checkpoints)
    steps: dict[int, Path] = {}
    has_others = False
    if problem or not finished:
        digest = partial(checkpoint_digest, lineage, row.stable_steps)
        steps, has_others = _find_usable_checkpoints(committed, digest)
        if row.phase == "finetune" and (finished or has_others):
            steps = {}  # it begins with the assembled model, whose artifact has the same identity
        unfinished = "saved with other settings or data" if has_others else ALL_DAMAGED if committed else NOT_TRAINED
        problem = None if steps else problem or unfinished
    if problem:
        keys = [change for change in changes if _concerns(change, row.phase)]
        return decide(False, problem if problem in (ALL_DAMAGED, NOT_TRAINED) else "; ".join(keys) or problem)
    if steps and (finished or has_others):  # only the part before a decay that changed
        copier.copy_checkpoints(folder, target, steps.values())
        return decide(True, f"unfinished, from step {max(steps)}")
    copier.copy_phase(folder, target, (steps or committed).values())
    if row.phase == "finetune" and source.assembled.result is not None:
        copier.copy_phase(source.assembled, new.assembled)
    relative = folder.path.relative_to(source.path)
    for log in (Path("fleet") / relative, *([Path("partial") / relative.name] if row.phase == "incubate" else [])):
        if (source.path / log).is_dir():
            copier.copy_folder(source.path / log, new.path / log, link=False)
    return decide(True, f"unfinished, from step {max(steps)}" if steps else "finished")


def _find_usable_checkpoints(
    checkpoints: dict[int, Path], expected_digest: Callable[[int], str]
) -> tuple[dict[int, Path], bool]:
    """Find the checkpoints from which a phase can resume. Damaged ones are left out with a warning.

    Args:
        checkpoints: The committed checkpoints of the phase, by step.
        expected_digest: Returns the digest that the checkpoint of a step must have.

    Returns:
        The checkpoints that can be used, and whether there are others, which were saved with other settings or data.

    Raises:
        OSError: A checkpoint cannot be read.
    """
    usable, has_others = {}, False
    for step, path in checkpoints.items():
        digest = (read_json(path / "manifest.json") or {}).get("digest")
        if digest not in (None, expected_digest(step)):  # not hashed: it cannot be used anyway
            has_others = True
        elif problem := verify_checkpoint(path):
            logger.warning("damaged checkpoint, left out: %s", problem)
        else:
            usable[step] = path
    return usable, has_others


def _is_finished(phase: ForkedPhase) -> bool:
    return phase.taken and phase.reason == "finished"


def _concerns(change: str, phase: Phase) -> bool:
    """Return whether a changed key is a key of a phase or a key that all phases share."""
    table = change.split(".")[0]
    return table == phase or table not in PHASES


def _rename(temporary: Path, new: RunDir) -> None:
    """Rename the complete folder to the path of the new run. A run without trained phases is replaced.

    Its events are kept, before those of the new run.
    """
    older = temporary.with_name(f"{temporary.name}.older")
    if new.recipe_file.exists():
        rows = new.read_events() + RunDir(temporary).read_events()
        (temporary / "events.jsonl").unlink()
        for row in rows:
            append_json_line(temporary / "events.jsonl", row)
    try:
        if new.recipe_file.exists():
            new.path.rename(older)
        temporary.rename(new.path)
    except BaseException:
        if older.exists() and not new.path.exists():
            older.rename(new.path)
        raise
    fsync_path(new.path.parent)
    shutil.rmtree(older, ignore_errors=True)


class _Copier:
    """Links or copies files, and counts them.

    Attributes:
        linked: Number of files that are hard links.
        copied: Number of bytes that were copied.
    """

    def __init__(self) -> None:
        self.linked, self.copied = 0, 0

    def copy_phase(self, folder: PhaseDir, target: PhaseDir, checkpoints: Iterable[Path] = ()) -> None:
        """Copy a phase with these checkpoints, without its leases and files of a save that was interrupted."""
        for path in sorted(folder.path.iterdir()):
            other = target.path / path.name
            if path.name == "checkpoints":
                for checkpoint in checkpoints:
                    self.copy_folder(checkpoint, other / checkpoint.name, link=True)
            elif path.name == "artifact" and folder.result is None:
                continue  # of an attempt that was killed before it wrote the result
            elif path.is_dir() and path.name != "owners" and not path.name.startswith("."):
                self.copy_folder(path, other, link=path.name in LINKED)
            elif path.is_file() and not path.name.startswith("."):
                self.copy_file(path, other, link=False)

    def copy_checkpoints(self, folder: PhaseDir, target: PhaseDir, checkpoints: Iterable[Path]) -> None:
        """Copy checkpoints of a phase and its metrics, whose later steps are removed when training resumes."""
        for path in checkpoints:
            self.copy_folder(path, target.checkpoints / path.name, link=True)
        if folder.metrics.exists():
            self.copy_file(folder.metrics, target.metrics, link=False)

    def copy_folder(self, folder: Path, target: Path, *, link: bool) -> None:
        """Copy the regular files of a folder and its subfolders.

        Raises:
            OSError: A folder cannot be read.
        """

        def stop(error: OSError) -> None:
            raise error

        for parent, _, names in os.walk(folder, onerror=stop):
            for file in sorted(Path(parent, name) for name in names):
                if file.is_file() and not file.is_symlink():
                    self.copy_file(file, target / file.relative_to(folder), link=link)

    def copy_file(self, file: Path, target: Path, *, link: bool) -> None:
        """Link or copy a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if link and link_or_copy(file, target):
            self.linked += 1
            return
        if not link:
            shutil.copyfile(file, target)
            fsync_path(target)
        self.copied += target.stat().st_size


def describe_fork(fork: Fork, source: RunDir) -> list[str]:
    """Return lines that say which phases were taken over and which will be trained, and why."""
    width = max(len(phase.title) for phase in fork.phases)
    lines = [f"{fork.run.path}: forked from {source.path}"]
    for phase in fork.phases:
        verb = "taken over" if phase.taken else "to be trained"
        lines.append(f"  {phase.title:<{width}}  {verb}: {phase.reason}")
    how = format_count(fork.linked, "hard link") if fork.linked else "hard links are not possible here"
    return [*lines, f"{how}; {fork.copied / 2**20:,.1f} MiB copied"]
