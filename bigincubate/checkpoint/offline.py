"""Resume checkpoints looked at and rewritten while nothing trains: by their files alone, without ranks."""

from __future__ import annotations

import math
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, ConfigError, DamagedError
from ..files import read_json, read_small, write_hashed
from .manager import MARKER, STATE, Manifest, commit, verify
from .pieces import Piece, PieceReader, write_pieces

NAME = re.compile(r"(?:step|\.saving)-(\d{8,}).*")
PLACES = ("*", "checkpoints/*", "*/checkpoints/*", "modules/*/checkpoints/*")  # as seen from a phase's folder, a run's


def survey(path: Path) -> list[dict[str, Any]]:
    """A row a checkpoint in a run directory, in a phase's, or ``path`` itself; attempts at one too. Every file of what
    was committed is read and hashed.

    Returns:
        path, step, ranks, bytes, committed, problem (see :func:`verify`; None where committed and sound), time (of the
        last change, seconds since the epoch); phases in order, steps in numeric order.

    Raises:
        ArtifactError: there is none.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory")
    folders = [path]
    if not (path / MARKER).exists() and not NAME.fullmatch(path.name):
        named = {folder: NAME.fullmatch(folder.name) for place in PLACES for folder in path.glob(place)}
        steps = {folder: int(match[1]) for folder, match in named.items() if match and folder.is_dir()}
        folders = sorted(steps, key=lambda folder: (folder.parent, steps[folder], folder))
    rows = [row for folder in folders if (row := _look(folder))]
    if not rows:
        raise ArtifactError(f"no checkpoints in {path}; give a run directory, a phase's directory or a checkpoint")
    return rows


def _look(folder: Path) -> dict[str, Any] | None:
    """None where a running phase has removed or renamed it meanwhile."""
    problem, committed = verify(folder), (folder / MARKER).exists()
    manifest, name = read_json(folder / "manifest.json") or {}, NAME.fullmatch(folder.name)
    try:
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        return {
            "path": str(folder),
            "step": int(name[1]) if name else manifest.get("step"),
            "ranks": manifest.get("world", sum(file.startswith("rank-") for file in sizes)),
            "bytes": sum(sizes.values()),
            "committed": committed,
            "problem": problem if committed else f"{folder} was never committed",
            "time": folder.stat().st_mtime,
        }
    except FileNotFoundError:
        return None


def convert(source: Path, out: Path, *, ranks: int = 1) -> None:
    """Write the tensors of a checkpoint anew as the files of ``ranks`` ranks; with one, they are whole tensors in one
    safetensors file. The result is committed as any checkpoint, and can take the place of ``source``.

    Raises:
        ArtifactError: ``source`` is no committed checkpoint.
        DamagedError: it is damaged.
        ConfigError: something is at ``out``.
    """
    if not (source / MARKER).exists():
        raise ArtifactError(
            f"{source} is not a committed checkpoint; `bigincubate checkpoint list` shows those of a run"
        )
    if problem := verify(source):
        raise DamagedError(problem)
    if out.exists():
        raise ConfigError(f"{out} exists; choose another place, or remove it first")
    manifest = Manifest.model_validate_json(read_small(source / "manifest.json"))
    tensors = PieceReader(manifest.tensors(source))
    aside = out.with_name(f".saving-{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        files = {}
        for rank in range(ranks):
            if pieces := share(tensors, rank, ranks):
                name = f"rank-{rank:05d}.safetensors"
                files[name] = write_pieces(aside / name, pieces)
        files[STATE] = write_hashed(aside / STATE, [read_small(source / STATE)])
        commit(aside, out, step=manifest.step, digest=manifest.recipe, world=ranks, files=files)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def share(tensors: PieceReader, rank: int, ranks: int) -> dict[str, Piece]:
    """The ``rank``-th of ``ranks`` parts, of one length, of every tensor; of a small one, some ranks have nothing."""
    pieces = {}
    for key, shape in tensors.shapes.items():
        size = math.prod(shape)
        length = -(-size // ranks)
        low, high = min(size, rank * length), min(size, (rank + 1) * length)
        if low < high:
            part = tensors.part(key, low, high - low)
            pieces[key] = Piece(part.view(shape) if len(part) == size else part, low, shape)
    return pieces
