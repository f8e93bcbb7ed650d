"""Artifacts: what a phase hands on, as safetensors under timm's own names, with a manifest of where it came from.

A module holds the parameters of its own blocks under the **target's** block indices, so that modules join by key
union whatever trained them. Folder: ``weights.safetensors``, then ``manifest.json``, which is written last.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ArtifactError, LockedError
from ..files import fsync_dir, read_json, sha256, write_json
from .lock import Claim
from .pieces import whole, write_pieces

WEIGHTS = "weights.safetensors"


class ModelSpec(BaseModel):
    """Enough to build the model again, and to feed it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    args: dict[str, Any]
    depths: list[list[int]]  # per module, per stage
    num_classes: int
    img_size: int
    mean: list[float]
    std: list[float]
    interpolation: Literal["bicubic", "bilinear"]
    eval_crop: float


class Manifest(BaseModel):
    """Where an artifact came from. Digests are SHA-256, hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    kind: Literal["model", "module"]
    phase: str
    module: int | None = None
    model: ModelSpec
    weights: Literal["raw", "ema"]
    recipe: str  # digest of the recipe's identity keys
    data: str  # digest of the data set
    meta: str | None = None  # digest of the meta model's weights that a module grew beside
    digest: str = ""  # of weights.safetensors


def save_artifact(folder: Path, tensors: dict[str, Tensor], manifest: Manifest, claim: Claim | None = None) -> Manifest:
    """Write an artifact whole or not at all, in place of any older one. Returns the manifest with its digest.

    Raises:
        LockedError: the claim is lost; the older one is as it was.
    """
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    entry = write_pieces(aside / WEIGHTS, {key: whole(value.cpu()) for key, value in tensors.items()})
    manifest = manifest.model_copy(update={"digest": entry["sha256"]})
    write_json(aside / "manifest.json", manifest.model_dump())
    try:
        (claim or Claim()).check()
    except LockedError:
        shutil.rmtree(aside)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    fsync_dir(folder.parent)
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """
    Raises:
        ArtifactError: there is no artifact, or its manifest is not one.
    """
    raw = read_json(folder / "manifest.json")
    if raw is None:
        raise ArtifactError(f"no artifact in {folder}")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{folder / 'manifest.json'}: {error.errors()[0]['msg']}") from None


def load_artifact(folder: Path) -> tuple[dict[str, Tensor], Manifest]:
    """
    Raises:
        ArtifactError: missing, or not what its manifest says (file, expected and found hash in the message).
    """
    manifest = load_manifest(folder)
    file = folder / WEIGHTS
    try:
        found = sha256(file)
        if found != manifest.digest:
            raise ArtifactError(f"{file}: SHA-256 {found[:12]}…, expected {manifest.digest[:12]}…: damaged")
        return load_file(file), manifest
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror}") from None
    except SafetensorError as error:
        raise ArtifactError(f"{file}: {error}") from None


def check_module(folder: Path, *, recipe: str, meta: str, data: str) -> str | None:
    """Why the module in ``folder`` cannot join the assembly; None if it can."""
    try:
        manifest = load_manifest(folder)
    except ArtifactError as error:
        return str(error)
    for name, wanted, found in (
        ("recipe", recipe, manifest.recipe),
        ("meta model", meta, manifest.meta),
        ("data", data, manifest.data),
    ):
        if wanted != found:
            return f"stale: it grew from another {name} ({str(found)[:12]}…, this run's is {wanted[:12]}…)"
    return None
