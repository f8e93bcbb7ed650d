"""Resume checkpoints: written aside, hashed, committed last, verified before they are read.

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

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..cluster.env import RunEnv, stderr
from ..errors import ArtifactError, DamagedError, EnvironmentFault
from ..files import fsync_dir, fsync_file, sha256, write_text
from .pieces import Piece, PieceReader, pack

STEP = re.compile(r"step-(\d{8,})")
MARKER = "COMMITTED"


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
    """

    def __init__(self, folder: Path, env: RunEnv, *, digest: str, keep: int = 2) -> None:
        self.folder, self.env, self.digest, self.keep = folder, env, digest, keep
        if env.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            committed = {self._at(step) for step in self.steps()}
            for left in (*folder.glob(".saving-*"), *folder.glob("step-*")):
                if left not in committed:  # an attempt died while it wrote or removed this
                    shutil.rmtree(left)
        env.barrier()

    # ------------------------------------------------------------------------------------------ writing

    def save(self, step: int, tensors: Mapping[str, Tensor | Piece], state: dict[str, Any]) -> None:
        """Commit a checkpoint of ``step``: what this rank holds (it may be nothing), and ``state`` from rank 0.

        Raises:
            EnvironmentFault: some rank could not write; no checkpoint was changed.
        """
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / self.env.broadcast(f".saving-{step:08d}-{uuid.uuid4().hex[:8]}")
        files: dict[str, dict[str, Any]] = {}
        problem = ""
        try:
            aside.mkdir(exist_ok=True)
            if tensors:
                name = f"rank-{self.env.rank:05d}.safetensors"
                files[name] = write_file(aside / name, pack(tensors))
            if self.env.is_main:
                files["state.json"] = write_file(aside / "state.json", json.dumps(state, indent=1).encode())
        except OSError as error:
            problem = f"{error.filename or aside}: {error.strerror}"
        reports = self.env.gather((files, problem))
        problems = [text for _, text in reports if text]
        if not problems and self.env.is_main:
            try:
                if final.exists():  # of an attempt that died before its marker
                    shutil.rmtree(final)
                entries = {name: entry for report, _ in reports for name, entry in sorted(report.items())}
                commit(aside, final, step=step, digest=self.digest, world=self.env.world, files=entries)
                self._prune(step)
            except OSError as error:
                problems = [f"{error.filename or final}: {error.strerror}"]
        problems = self.env.broadcast(problems)
        if problems:
            if self.env.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise EnvironmentFault(f"checkpoint of step {step} not written: {problems[0]}; earlier ones are intact")

    def _prune(self, newest: int) -> None:
        """Keep the newest; those beyond ``newest`` were damaged, or training would have gone on from there."""
        kept = [step for step in self.steps() if step <= newest][-self.keep :]
        for step in set(self.steps()).difference(kept):
            # the marker goes first: half a directory must not look committed
            (self._at(step) / MARKER).unlink()
            shutil.rmtree(self._at(step))

    # ------------------------------------------------------------------------------------------ reading

    def steps(self) -> list[int]:
        """The committed steps, in numeric order."""
        matches = (STEP.fullmatch(marker.parent.name) for marker in self.folder.glob(f"step-*/{MARKER}"))
        return sorted(int(match[1]) for match in matches if match)

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
        manifest = _read(folder / "manifest.json")
        if manifest["recipe"] != self.digest:
            raise ArtifactError(f"{folder} was made by another recipe; use another --run-dir, or remove it")
        files = [folder / name for name in manifest["files"] if name.endswith(".safetensors")]
        return Checkpoint(step, PieceReader(files), _read(folder / "state.json"))

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
    """Make the files in ``aside`` the checkpoint ``final``, which must not be there: manifest, rename, marker.

    Args:
        files: size and SHA-256 of each, as :func:`write_file` gave them.
    """
    manifest = {"format": 1, "step": step, "recipe": digest, "world": world, "files": files}
    text = json.dumps(manifest, indent=1)
    write_file(aside / "manifest.json", text.encode())
    fsync_dir(aside)
    aside.rename(final)
    fsync_dir(final.parent)
    write_text(final / MARKER, hashlib.sha256(text.encode()).hexdigest())


def verify(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint directory, naming file, expected and found; None if nothing is."""
    try:
        expected, found = (folder / MARKER).read_text().strip(), sha256(folder / "manifest.json")
        if expected != found:
            return f"{folder / 'manifest.json'}: SHA-256 {found[:12]}…, expected {expected[:12]}…"
        for name, entry in json.loads((folder / "manifest.json").read_text())["files"].items():
            if (size := (folder / name).stat().st_size) != entry["size"]:
                return f"{folder / name}: {size} bytes, expected {entry['size']}"
            if (found := sha256(folder / name)) != entry["sha256"]:
                return f"{folder / name}: SHA-256 {found[:12]}…, expected {entry['sha256'][:12]}…"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except UnicodeDecodeError:
        return f"{folder / MARKER}: not text"
    return None


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write and fsync. Gives what a manifest says of the file."""
    path.write_bytes(data)
    fsync_file(path)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
