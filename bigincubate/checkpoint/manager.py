"""Resume checkpoints: written aside, hashed, committed last, verified before they are read.

Training waits for the copy to the host alone; a thread of each rank writes. One save is under way at a time: where the
disk is slower than the training, the next save waits for it.

::

    checkpoints/step-00000500/
      rank-00000.safetensors    this rank's tensors
      state.json                step, seconds, counters
      manifest.json             size and SHA-256 of every file, the recipe's digest, the world size
      COMMITTED                 the SHA-256 of manifest.json; written last

A directory without a valid ``COMMITTED`` does not exist for the reader. Nothing is ever written over, and nothing is
unpickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..cluster.env import RunEnv, stderr
from ..errors import ArtifactError, BigincubateError, DamagedError, EnvironmentFault, LockedError
from ..files import (
    fsync_dir,
    make_folder,
    plain_size,
    read_json,
    read_small,
    sha256,
    write_hashed,
)
from .lock import Claim
from .pieces import Piece, PieceReader, snapshot, write_pieces

STEP = re.compile(r"step-(\d{8,})")
MARKER = "COMMITTED"
STATE = "state.json"
FileName = Annotated[str, Field(pattern=r"^(rank-[0-9]{5,}\.safetensors|state\.json)$")]  # never a path


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    size: int = Field(ge=0)  # bytes
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """``manifest.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal[1]
    step: int = Field(ge=0)
    recipe: str  # digest of its identity keys
    world: int = Field(ge=1)
    files: dict[FileName, File]

    def tensors(self, folder: Path) -> list[Path]:
        return [folder / name for name in self.files if name != STATE]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the tensors of all ranks, read as they are asked for, and the state."""

    step: int
    tensors: PieceReader
    state: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one phase directory.

    Args:
        folder: ``…/checkpoints``.
        digest: the recipe's digest; a checkpoint of another recipe is refused.
        keep: how many committed checkpoints stay (at least 2).
        claim: to the phase directory; without it nothing is committed or removed.

    Raises:
        LockedError: the claim is lost.
    """

    def __init__(self, folder: Path, env: RunEnv, *, digest: str, keep: int = 2, claim: Claim | None = None) -> None:
        self.folder, self.env, self.digest, self.keep = folder, env, digest, keep
        self.claim = claim or Claim()
        self._apart = env.apart()  # saves talk beside the training
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._figures: dict[str, float] = {}
        with env.first():
            if env.is_main:
                self.claim.check()
                make_folder(folder)
                committed = {self._at(step) for step in self.steps()}
                for left in (*folder.glob(".saving-*"), *folder.glob("step-*")):
                    if left not in committed:  # an attempt died while it wrote or removed this
                        shutil.rmtree(left)

    # ------------------------------------------------------------------------------------------ writing

    def start(self, step: int, tensors: Mapping[str, Tensor | Piece], state: dict[str, Any]) -> None:
        """Begin a checkpoint of ``step``: what this rank holds (it may be nothing), and ``state`` from rank 0. Copied
        to the host before this returns, written and committed while training goes on. On all ranks together.

        Raises:
            EnvironmentFault: the save before, which is awaited first, failed.
        """
        began = time.perf_counter()
        self.wait()
        pieces, text = snapshot(tensors), json.dumps(state, indent=1)
        self._thread = threading.Thread(target=self._run, args=(step, pieces, text), daemon=True)
        self._thread.start()
        self._figures["checkpoint/blocked_ms"] = 1e3 * (time.perf_counter() - began)

    def wait(self) -> None:
        """Until the last save is committed. On all ranks together.

        Raises:
            EnvironmentFault: some rank could not write; earlier checkpoints are as they were.
            LockedError: the claim is lost; nothing was committed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def save(self, step: int, tensors: Mapping[str, Tensor | Piece], state: dict[str, Any]) -> None:
        """:meth:`start` and :meth:`wait`."""
        self.start(step, tensors, state)
        self.wait()

    def close(self) -> None:
        """Nothing more is saved. A save that is under way, after an error elsewhere, is left to itself."""
        if self._thread is None or not self._thread.is_alive():
            self._apart.close_apart()

    @property
    def failed(self) -> bool:
        """Whether :meth:`wait` would raise. A rank may know before the others do."""
        return self._problem is not None

    def figures(self) -> dict[str, float]:
        """Of saves since the last call: how long training was blocked, this rank's bytes a second."""
        figures, self._figures = self._figures, {}
        return figures

    def _run(self, step: int, pieces: dict[str, Piece], state: str) -> None:
        try:
            self._save(step, pieces, state)
        except BaseException as error:  # for the thread that waits
            self._problem = error

    def _save(self, step: int, pieces: dict[str, Piece], state: str) -> None:
        began, env = time.perf_counter(), self._apart
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / env.broadcast(f".saving-{step:08d}-{uuid.uuid4().hex[:8]}")
        files: dict[str, dict[str, Any]] = {}
        problem = ""
        try:
            aside.mkdir(exist_ok=True)
            if pieces:
                name = f"rank-{env.rank:05d}.safetensors"
                files[name] = write_pieces(aside / name, pieces)
            if env.is_main:
                files[STATE] = write_hashed(aside / STATE, [state.encode()])
        except OSError as error:
            problem = explain(error, aside)
        reports = env.gather((files, problem))
        problem = next((text for _, text in reports if text), "")
        refusal: BigincubateError | None = None
        if env.is_main:
            try:
                self.claim.check()  # first: its heir may have removed what we wrote
                if not problem:
                    if final.exists():  # damaged, and passed over
                        shutil.rmtree(final)
                    entries = {name: entry for report, _ in reports for name, entry in sorted(report.items())}
                    commit(aside, final, step=step, digest=self.digest, world=env.world, files=entries)
                    self._prune(step)
            except OSError as error:
                problem = explain(error, final)
            except LockedError as error:
                refusal = error
            if problem and refusal is None:
                refusal = EnvironmentFault(f"checkpoint of step {step} not written: {problem}; earlier ones are intact")
                try:
                    self.claim.check()  # once more: an heir may have taken away what was being written
                except LockedError as error:
                    refusal = error
        refusal = env.broadcast(refusal)
        if refusal is not None:
            if env.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise refusal
        if written := sum(entry["size"] for entry in files.values()):
            self._figures["checkpoint/mib_per_sec"] = written / 2**20 / (time.perf_counter() - began)

    def _prune(self, newest: int) -> None:
        """Keep the newest; those beyond ``newest`` were damaged, or training would have gone on from there."""
        kept = [step for step in self.steps() if step <= newest][-self.keep :]
        for step in set(self.steps()).difference(kept):
            self.claim.check()
            if self._at(step).is_symlink():  # what it leads to is not ours
                self._at(step).unlink()
                continue
            # the marker goes first: half a directory must not look committed
            (self._at(step) / MARKER).unlink()
            shutil.rmtree(self._at(step))

    # ------------------------------------------------------------------------------------------ reading

    def steps(self) -> list[int]:
        """The committed steps, in numeric order."""
        matches = (STEP.fullmatch(marker.parent.name) for marker in self.folder.glob(f"step-*/{MARKER}"))
        numbers = {int(match[1]) for match in matches if match}
        return sorted(step for step in numbers if (self._at(step) / MARKER).exists())  # of one number, one spelling

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None where there never was one. A damaged one is named on stderr
        and passed over.

        Raises:
            DamagedError: there are checkpoints, and every one is damaged.
            ArtifactError: the checkpoint belongs to another recipe.
        """
        step = self.env.broadcast(self._choose() if self.env.is_main else None)
        if isinstance(step, str):
            raise DamagedError(step)
        if step is None:
            return None
        folder = self._at(step)
        manifest = Manifest.model_validate_json(read_small(folder / "manifest.json"))
        if manifest.recipe != self.digest:
            raise ArtifactError(f"{folder} was made by another recipe; use another --run-dir, or remove it")
        return Checkpoint(step, PieceReader(manifest.tensors(folder)), read_json(folder / STATE) or {})

    def _choose(self) -> int | str | None:
        damaged = []
        for step in reversed(self.steps()):
            if (problem := verify(self._at(step))) is None:
                return step
            damaged.append(problem)
            stderr(f"damaged checkpoint, passed over: {problem}")
        if damaged:
            return f"every checkpoint in {self.folder} is damaged ({damaged[0]}); remove the folder to start again"
        return None

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def commit(aside: Path, final: Path, *, step: int, digest: str, world: int, files: dict[str, dict[str, Any]]) -> None:
    """Make the files in ``aside`` the checkpoint ``final``, which must not be there: manifest, rename, marker. Where
    an heir has taken ``aside`` or ``final`` away meanwhile, the renames fail, and touch nothing of its own.

    Args:
        files: size and SHA-256 of each.
    """
    manifest = {"format": 1, "step": step, "recipe": digest, "world": world, "files": files}
    text = json.dumps(manifest, indent=1)
    write_hashed(aside / "manifest.json", [text.encode()])
    marker = f"{aside.name}.marker"
    write_hashed(aside / marker, [hashlib.sha256(text.encode()).hexdigest().encode()])
    fsync_dir(aside)
    aside.rename(final)
    fsync_dir(final.parent)
    (final / marker).rename(final / MARKER)
    fsync_dir(final)


def verify(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint directory, naming file, expected and found; None if nothing is.

    Nothing outside the directory is opened, nothing that has no hash is read, and tensors are not loaded.
    """
    file = folder / "manifest.json"
    try:
        if folder.is_symlink():
            return f"{folder} is a symbolic link; refused"
        manifest = Manifest.model_validate_json(sealed(folder))
        if (match := STEP.fullmatch(folder.name)) and int(match[1]) != manifest.step:
            return f"{file}: it is of step {manifest.step}, expected {int(match[1])}"
        for name, entry in manifest.files.items():
            if (size := plain_size(folder / name)) != entry.size:
                return f"{folder / name}: {size} bytes, expected {entry.size}"
            if (found := sha256(folder / name)) != entry.sha256:
                return f"{folder / name}: SHA-256 {found[:12]}…, expected {entry.sha256[:12]}…"
        state = read_json(folder / STATE)
        if state is None or state.get("step", manifest.step) != manifest.step:
            return f"{folder / STATE}: not the state of step {manifest.step}"
        PieceReader(manifest.tensors(folder))
    except OSError as error:
        return explain(error, folder)
    except ValidationError as error:
        return f"{file}: not a manifest: {error.errors()[0]['msg']}"
    except ArtifactError as error:
        return str(error)
    return None


def sealed(folder: Path) -> bytes:
    """``manifest.json`` as it was committed.

    Raises:
        OSError: it or the marker is missing, or no plain file.
        ArtifactError: it is not what the marker was written for.
    """
    file, marker = folder / "manifest.json", folder / MARKER
    if (size := plain_size(marker)) != 64:
        raise ArtifactError(f"{marker}: {size} bytes, expected 64")
    text, expected = read_small(file), marker.read_bytes().decode(errors="replace")
    if (found := hashlib.sha256(text).hexdigest()) != expected:
        raise ArtifactError(f"{file}: SHA-256 {found[:12]}…, expected {expected[:12]!r}…")
    return text


def explain(error: OSError, path: Path) -> str:
    """The file, or ``path`` where the error names none, and what happened; of a full disk, what is left of it."""
    text = f"{error.filename or path}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return text
    place = next(place for place in (path, *path.parents) if place.exists())
    return f"{text} ({shutil.disk_usage(place).free} bytes free)"
