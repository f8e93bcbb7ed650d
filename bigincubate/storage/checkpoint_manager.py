"""Resume checkpoints, written in the background, committed atomically and verified before they are read.

Training waits only until the tensors are copied to the CPU; then a thread of each rank writes the files. Only one save
is in progress at a time: if the disk is too slow, the next save waits for the previous one.

::

    checkpoints/step-00000500/
      rank-00000.safetensors    the tensors of rank 0
      state.json                step, seconds, counters
      manifest.json             size and SHA-256 of every file, digest of the phase, world size
      COMMITTED                 the SHA-256 of manifest.json; written last

A directory without a valid ``COMMITTED`` is ignored. Files are never overwritten, and nothing is unpickled: tensors are
safetensors, everything else is JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RETRY, ArtifactError, BigincubateError, DamagedError, SystemResourceError
from ..files import fsync_path, list_folder, make_folder, read_json, read_small_file, write_and_hash
from .checkpoint_verification import (
    COMMIT_MARKER,
    STATE_FILE,
    CheckpointManifest,
    describe_os_error,
    find_committed,
    parse_step,
    verify_checkpoint,
)
from .lease import Lease
from .sharded_tensors import ShardedTensorReader, TensorShard, copy_to_cpu, write_sharded_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ..distributed.process_group import DistributedContext

logger = logging.getLogger(__name__)

Digest = str | Callable[[int], str]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: Optimizer step after which it was saved.
        tensors: The tensors of all ranks, which are read on access.
        state: The content of ``state.json``.
    """

    step: int
    tensors: ShardedTensorReader
    state: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one phase directory.

    Args:
        folder: The phase's ``checkpoints`` directory.
        env: The ranks.
        save_env: The same ranks with a separate control group, so that messages of saves and training do not mix.
        digest: Digest of the phase, or a function that returns it for a step. A checkpoint with another digest is
            refused.
        keep: Number of committed checkpoints to keep (at least 2).
        kept_step: A step whose checkpoint is kept too.
        lease: Lease on the phase directory. Once it is lost, nothing is committed or removed.
    """

    def __init__(
        self,
        folder: Path,
        env: DistributedContext,
        save_env: DistributedContext,
        *,
        digest: Digest,
        keep: int,
        lease: Lease,
        kept_step: int = 0,
    ) -> None:
        self.folder, self.env, self._save_env = folder, env, save_env
        self.digest: Callable[[int], str] = digest if callable(digest) else lambda step: digest
        self.keep, self.lease, self.kept_step = keep, lease, kept_step
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._metrics: dict[str, float] = {}
        self._skipped: set[int] = set()  # steps of checkpoints for which the disk reported an error

    @classmethod
    def open(
        cls,
        folder: Path,
        env: DistributedContext,
        *,
        digest: Digest,
        keep: int = 2,
        lease: Lease | None = None,
        kept_step: int = 0,
    ) -> CheckpointManager:
        """Open the checkpoints of a phase directory, and remove incomplete ones of previous attempts.

        Called by all ranks together. Arguments are those of the constructor.

        Raises:
            LockedError: The lease is lost.
            SystemResourceError: The checkpoints cannot be read. Nothing is removed.
        """
        control, lease = env.clone_control_group(), lease or Lease()
        manager = cls(folder, env, control, digest=digest, keep=keep, lease=lease, kept_step=kept_step)
        with env.main_process_first():
            if env.is_main:
                manager.lease.check()
                make_folder(folder)
                committed = {manager._step_path(step) for step in manager.committed_steps()}
                for path in list_folder(folder):
                    own = path.name.startswith(".saving-") or parse_step(path.name) is not None
                    if own and path not in committed:  # an attempt was killed while it wrote or removed this
                        remove_checkpoint(path)
        return manager

    # ------------------------------------------------------------------------------------------ writing

    def start_save(self, step: int, tensors: Mapping[str, Tensor | TensorShard], state: dict[str, Any]) -> None:
        """Start saving a checkpoint. Called by all ranks together.

        Tensors are copied to the CPU before this returns, and written and committed while training continues.

        Args:
            step: Number of optimizer steps done.
            tensors: The tensors of this rank; may be empty.
            state: A JSON object; only that of rank 0 is saved.

        Raises:
            SystemResourceError: The previous save, for which this waits, failed.
        """
        began = time.perf_counter()
        self.wait()
        shards, text = copy_to_cpu(tensors), json.dumps(state, indent=1)
        self._thread = threading.Thread(target=self._run, args=(step, shards, text), daemon=True)
        self._thread.start()
        self._metrics["checkpoint/blocked_ms"] = 1e3 * (time.perf_counter() - began)

    def wait(self) -> None:
        """Wait until the last save is committed. Called by all ranks together.

        Raises:
            SystemResourceError: A rank could not write its files. Earlier checkpoints are unchanged.
            LockedError: The lease is lost. Nothing was committed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def save(self, step: int, tensors: Mapping[str, Tensor | TensorShard], state: dict[str, Any]) -> None:
        """Save a checkpoint and wait until it is committed; see :meth:`start_save`."""
        self.start_save(step, tensors, state)
        self.wait()

    def close(self) -> None:
        """Wait for a save in progress, ignoring its errors, and destroy the control group.

        Call this before the lease is released: this process must not write to a directory that has a new owner.
        """
        if self._thread is not None:
            self._thread.join()
        self._save_env.close_control_group()

    @property
    def failed(self) -> bool:
        """Return whether the last save failed, so that :meth:`wait` raises. May differ between ranks for a while."""
        return self._error is not None

    def pop_metrics(self) -> dict[str, float]:
        """Return the metrics of saves since the last call.

        Returns:
            ``checkpoint/blocked_ms``, the time that training waited, and ``checkpoint/mib_per_sec``, the write rate of
            this rank.
        """
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _run(self, step: int, shards: dict[str, TensorShard], state: str) -> None:
        try:
            self._save(step, shards, state)
        except BaseException as error:  # raised by wait()
            self._error = error

    def _save(self, step: int, shards: dict[str, TensorShard], state: str) -> None:
        began, env = time.perf_counter(), self._save_env
        temporary = self.folder / env.broadcast(f".saving-{step:08d}-{uuid.uuid4().hex[:8]}")
        files: dict[str, dict[str, Any]] = {}
        problem = ""
        try:
            temporary.mkdir(exist_ok=True)
            if shards:
                name = f"rank-{env.rank:05d}.safetensors"
                files[name] = write_sharded_tensors(temporary / name, shards)
            if env.is_main:
                files[STATE_FILE] = write_and_hash(temporary / STATE_FILE, [state.encode()])
        except OSError as error:
            problem = describe_os_error(error, temporary)
        reports = env.gather((files, problem))
        with env.main_process_first():
            if env.is_main:
                entries = {name: entry for report, _ in reports for name, entry in sorted(report.items())}
                problem = next((text for _, text in reports if text), "")
                try:
                    self._commit(temporary, step, entries, problem)
                except BigincubateError:
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise
        if written := sum(entry["size"] for entry in files.values()):
            self._metrics["checkpoint/mib_per_sec"] = written / 2**20 / (time.perf_counter() - began)

    def _commit(self, temporary: Path, step: int, files: dict[str, dict[str, Any]], problem: str) -> None:
        """Commit the files in ``temporary`` unless a rank failed with ``problem``, and prune older checkpoints."""
        self.lease.check()  # first: a new owner may have removed the files written here
        final = self._step_path(step)
        try:
            if not problem:
                if final.exists():  # damaged or unreadable, because training resumed from an earlier checkpoint
                    shutil.rmtree(final)
                digest = self.digest(step)
                commit_checkpoint(temporary, final, step=step, digest=digest, world=self.env.world, files=files)
                self._prune(step)
        except OSError as error:
            problem = describe_os_error(error, final)
        if problem:
            self.lease.check()  # again: a new owner may have removed files that were being written
            raise SystemResourceError(
                f"checkpoint of step {step} not written: {problem}; earlier checkpoints are unchanged"
            )

    def _prune(self, newest: int) -> None:
        """Remove all but the last ``keep`` checkpoints up to step ``newest``, and that of ``kept_step``.

        Later checkpoints are damaged, because training would have resumed from them otherwise; those that could not be
        read are kept until training reaches their step.
        """
        kept = [step for step in self.committed_steps() if step <= newest]
        kept = [*kept[-self.keep :], *(step for step in kept if step == self.kept_step)]
        for step in set(self.committed_steps()).difference(kept, (step for step in self._skipped if step > newest)):
            self.lease.check()
            remove_checkpoint(self._step_path(step))

    # ------------------------------------------------------------------------------------------ reading

    def committed_steps(self) -> list[int]:
        """Return the steps of the committed checkpoints, in numeric order.

        Raises:
            SystemResourceError: They cannot be read.
        """
        try:
            return sorted(find_committed(self.folder))
        except OSError as error:
            raise self._describe_unreadable(error) from None

    def load_latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that passes verification, or None if there are no checkpoints.

        Damaged checkpoints are skipped and reported on stderr. Called by all ranks together.

        Raises:
            DamagedError: There are checkpoints, and all are damaged.
            ArtifactError: The checkpoint was saved with other settings, data or input artifacts.
            SystemResourceError: A checkpoint cannot be read, so it is unknown whether it is damaged. One whose disk
                reports an error is skipped like a damaged one if an earlier one can be read.
        """
        return self._load(self._choose_step)

    def load_step(self, step: int) -> Checkpoint | None:
        """Return the checkpoint of a step, or None if there is none. All ranks must call this.

        Raises:
            DamagedError: It is damaged.
            ArtifactError: It was saved with other settings, data or input artifacts.
            SystemResourceError: It cannot be read.
        """

        def verify() -> int | None:
            if step not in self.committed_steps():
                return None
            try:
                problem = verify_checkpoint(self._step_path(step))
            except OSError as error:
                raise self._describe_unreadable(error) from None
            if problem:
                raise DamagedError(problem)
            return step

        return self._load(verify)

    def _load(self, choose_step: Callable[[], int | None]) -> Checkpoint | None:
        step = None
        with self.env.main_process_first():
            if self.env.is_main:
                step = choose_step()
        if (step := self.env.broadcast(step)) is None:
            return None
        folder = self._step_path(step)
        manifest = CheckpointManifest.model_validate_json(read_small_file(folder / "manifest.json"))
        if manifest.digest != self.digest(step):
            raise ArtifactError(
                f"{folder} was saved with other settings, data, meta model or modules;"
                f" remove {self.folder} to train the phase from its start, or use another --run-dir"
            )
        return Checkpoint(
            step, ShardedTensorReader(manifest.tensor_files(folder)), read_json(folder / STATE_FILE) or {}
        )

    def _choose_step(self) -> int | None:
        damaged, unreadable = [], None
        for step in reversed(self.committed_steps()):
            try:
                problem = verify_checkpoint(self._step_path(step))
            except OSError as error:
                unreadable = self._describe_unreadable(error)
                if error.errno != errno.EIO:  # EIO may be a bad block that affects only this checkpoint
                    raise unreadable from None
                logger.warning("unreadable checkpoint, skipped: %s", unreadable)
                self._skipped.add(step)
                continue
            if problem is None:
                return step
            damaged.append(problem)
            logger.warning("damaged checkpoint, skipped: %s", problem)
        if unreadable is not None:
            raise unreadable
        if damaged:
            raise DamagedError(
                f"every checkpoint in {self.folder} is damaged ({damaged[0]}); remove the folder to start over"
            )
        return None

    def _describe_unreadable(self, error: OSError) -> SystemResourceError:
        reason, advice = describe_os_error(error, self.folder), "make the checkpoint readable or move it away"
        return SystemResourceError(f"{reason}; {advice}, {RETRY}")

    def _step_path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def commit_checkpoint(
    temporary: Path, final: Path, *, step: int, digest: str, world: int, files: dict[str, dict[str, Any]]
) -> None:
    """Commit a checkpoint: write the manifest, rename the directory, then rename the marker.

    If a new owner of the phase has removed ``temporary`` or ``final``, the renames fail without changing its files.

    Args:
        temporary: Directory with the files.
        final: The checkpoint, which must not exist.
        step: Number of optimizer steps done.
        digest: Digest of the phase.
        world: Number of ranks.
        files: Size and SHA-256 of each file.
    """
    manifest = {"format": 1, "step": step, "digest": digest, "world": world, "files": files}
    text = json.dumps(manifest, indent=1)
    write_and_hash(temporary / "manifest.json", [text.encode()])
    marker = f"{temporary.name}.marker"
    write_and_hash(temporary / marker, [hashlib.sha256(text.encode()).hexdigest().encode()])
    fsync_path(temporary)
    temporary.rename(final)
    fsync_path(final.parent)
    (final / marker).rename(final / COMMIT_MARKER)
    fsync_path(final)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its temporary directory, or anything else that has the name of a checkpoint.

    Raises:
        OSError: It cannot be removed. The error names ``folder``, even if the cause is an entry in it.
    """
    try:
        if folder.is_symlink() or not folder.is_dir():  # `rmtree` waits at a pipe, and a link may point anywhere
            folder.unlink()
            return
        (folder / COMMIT_MARKER).unlink(missing_ok=True)  # first: an incomplete directory must not look committed
        shutil.rmtree(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
