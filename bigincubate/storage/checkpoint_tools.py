"""List, prune and convert resume checkpoints, in a single process."""

from __future__ import annotations

import math
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, ConfigError, DamagedError
from ..files import list_folder, quote_path, read_json, read_small_file, write_and_hash
from .checkpoint_manager import commit_checkpoint, remove_checkpoint
from .checkpoint_verification import COMMIT_MARKER, STATE_FILE, CheckpointManifest, parse_step, verify_checkpoint
from .lease import NO_JOBS, JobQueue, acquire_lease
from .run_directory import RunDir
from .sharded_tensors import ShardedTensorReader, TensorShard, write_sharded_tensors

UNFINISHED_PATTERN = re.compile(r"\.saving-(\d{8,})-.*", re.ASCII)
PATTERNS = ("*", "checkpoints/*", "*/checkpoints/*", "modules/*/checkpoints/*")  # below the directory of a phase or run


def list_checkpoints(path: Path) -> list[dict[str, Any]]:
    """List the checkpoints below a run directory or the directory of a phase, or only the checkpoint ``path``.

    Directories that were never committed are listed too. Every file of a committed checkpoint is read and hashed.

    Returns:
        One row per checkpoint: path, step, ranks, bytes, committed, problem (None if committed and valid; see
        :func:`verify_checkpoint`), time (last change, in seconds since the epoch). Rows are sorted by directory and
        step.

    Raises:
        ArtifactError: There is no checkpoint.
        OSError: A checkpoint cannot be read, so it is unknown whether it is damaged.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory")
    folders = [path]
    if not (path / COMMIT_MARKER).exists() and _parse_step(path) is None:
        for checkpoints in (path / "checkpoints", *(phase.checkpoints for phase in RunDir(path).phases)):
            list_folder(checkpoints)  # raises an error that `glob` would hide
        found = {folder: _parse_step(folder) for pattern in PATTERNS for folder in path.glob(pattern)}
        steps = {folder: step for folder, step in found.items() if step is not None and folder.is_dir()}
        folders = sorted(steps, key=lambda folder: (folder.parent, steps[folder], folder))
    rows = [row for folder in folders if (row := _describe_checkpoint(folder))]
    if not rows:
        raise ArtifactError(
            f"no checkpoints in {quote_path(path)}; give a run directory, a phase's directory or a checkpoint"
        )
    return rows


def _parse_step(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint, or of one that is being saved; None for other names."""
    unfinished = UNFINISHED_PATTERN.fullmatch(folder.name)
    return int(unfinished[1]) if unfinished else parse_step(folder.name)


def _describe_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the row of a checkpoint, or None if a running phase has just removed or renamed it."""
    problem, committed = verify_checkpoint(folder), (folder / COMMIT_MARKER).exists()
    manifest, step = read_json(folder / "manifest.json") or {}, _parse_step(folder)
    try:
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        return {
            "path": str(folder),
            "step": manifest.get("step") if step is None else step,
            "ranks": manifest.get("world", sum(file.startswith("rank-") for file in sizes)),
            "bytes": sum(sizes.values()),
            "committed": committed,
            "problem": problem if committed else f"{folder} was never committed",
            "time": folder.stat().st_mtime,
        }
    except FileNotFoundError:
        return None


def prune_checkpoints(path: Path, *, keep: int, queue: JobQueue = NO_JOBS) -> list[Path]:
    """Remove all but the newest ``keep`` valid checkpoints of each phase in a run directory, or of one phase.

    Damaged and incomplete checkpoints are removed too, unless all checkpoints of a phase are damaged. The checkpoint
    before the decay of a warm-up-stable-decay schedule is kept, because forks of the run start from it.

    Args:
        path: The run directory or the directory of a phase.
        keep: Number of checkpoints to keep per phase.
        queue: The batch system, which is asked whether a job is training a phase.

    Returns:
        The directories that were removed.

    Raises:
        ArtifactError: There is no checkpoint.
        ConfigError: ``path`` is one checkpoint.
        LockedError: A process is training a phase.
        DamagedError: Every checkpoint of a phase is damaged. They are kept; other phases are pruned.
        OSError: A checkpoint cannot be read, so it is unknown whether it is damaged. Those of its phase are kept.
    """
    checkpoints = [Path(row["path"]) for row in list_checkpoints(path)]
    if path in checkpoints:
        raise ConfigError(f"{path} is one checkpoint; give a run directory or a phase's directory")
    removed, all_damaged = [], []
    for folder in dict.fromkeys(checkpoint.parent for checkpoint in checkpoints):
        with acquire_lease(folder.parent, queue=queue) as lease:
            rows = {Path(row["path"]): row for row in list_checkpoints(folder.parent)}
            valid = [checkpoint for checkpoint, row in rows.items() if row["problem"] is None]
            if not valid and any(row["committed"] for row in rows.values()):
                all_damaged.append(str(folder))
                continue
            before_decay = _last_step_before_decay(folder.parent)
            kept = {*valid[-keep:], *(checkpoint for checkpoint in valid if rows[checkpoint]["step"] == before_decay)}
            for checkpoint in rows.keys() - kept:
                lease.check()
                remove_checkpoint(checkpoint)
                removed.append(checkpoint)
    if all_damaged:
        raise DamagedError(f"every checkpoint is damaged in {', '.join(all_damaged)}; these were not removed")
    return sorted(removed)


def _last_step_before_decay(phase: Path) -> int | None:
    """Return the step after which a phase begins to decay, from the plan of its run; None if the plan has no phase."""
    phase = phase.resolve()
    for run in map(RunDir, phase.parents[:2]):  # modules are one folder deeper than other phases
        for row in run.planned_rows:
            if run.phase(row["phase"], row["module"]).path == phase:
                steps: int = row["stable_steps"]
                return steps
    return None


def convert_checkpoint(source: Path, out: Path, *, ranks: int = 1) -> None:
    """Convert a checkpoint to files of ``ranks`` ranks. With one rank, one safetensors file contains full tensors.

    The result is a committed checkpoint that can replace ``source``.

    Raises:
        ArtifactError: ``source`` is not a committed checkpoint.
        DamagedError: ``source`` is damaged.
        OSError: ``source`` cannot be read.
        ConfigError: ``out`` exists.
    """
    if not (source / COMMIT_MARKER).exists():
        raise ArtifactError(
            f"{source} is not a committed checkpoint; `bigincubate checkpoint list` shows those of a run"
        )
    if problem := verify_checkpoint(source):
        raise DamagedError(problem)
    if out.exists():
        raise ConfigError(f"{out} exists; choose another directory, or remove it first")
    manifest = CheckpointManifest.model_validate_json(read_small_file(source / "manifest.json"))
    tensors = ShardedTensorReader(manifest.tensor_files(source))
    temporary = out.with_name(f".saving-{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        files = {}
        for rank in range(ranks):
            if shards := _split_tensors(tensors, rank, ranks):
                name = f"rank-{rank:05d}.safetensors"
                files[name] = write_sharded_tensors(temporary / name, shards)
        files[STATE_FILE] = write_and_hash(temporary / STATE_FILE, [read_small_file(source / STATE_FILE)])
        commit_checkpoint(temporary, out, step=manifest.step, digest=manifest.digest, world=ranks, files=files)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _split_tensors(tensors: ShardedTensorReader, rank: int, ranks: int) -> dict[str, TensorShard]:
    """Return shard ``rank`` of ``ranks`` equal shards of every tensor, without empty shards of small tensors."""
    shards = {}
    for key, shape in tensors.shapes.items():
        size = math.prod(shape)
        length = -(-size // ranks)
        low, high = min(size, rank * length), min(size, (rank + 1) * length)
        if low < high:
            part = tensors.read_range(key, low, high - low)
            shards[key] = TensorShard(part.view(shape) if len(part) == size else part, low, shape)
    return shards
