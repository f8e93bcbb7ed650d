"""Artifacts: what a phase hands on, as safetensors under timm's own names, with a manifest of where it came from.

A module holds the parameters of its own blocks under the **target's** block indices, so that modules join by key
union whatever trained them. Folder: ``weights.safetensors``, ``manifest.json``, and the SHA-256 of the latter in
``COMMITTED``, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import Settings
from ..errors import ArtifactError, LockedError
from ..files import fsync_dir, make_folder, plain_size, sha256, write_hashed, write_text
from .lock import Claim
from .manager import MARKER, sealed
from .pieces import whole, write_pieces

WEIGHTS = "weights.safetensors"


class ModelSpec(BaseModel):
    """Enough to build the model again, and to feed it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    args: dict[str, Any]
    depths: list[list[Annotated[int, Field(ge=0, le=10_000)]]]  # per module, per stage
    num_classes: int
    img_size: int
    mean: list[float]
    std: list[float]
    interpolation: Literal["bicubic", "bilinear"]
    eval_crop: float

    @classmethod
    def of(cls, settings: Settings, depths: Sequence[Sequence[int]]) -> ModelSpec:
        """The model of these depths that a phase with these settings computes with."""
        model, augment = settings.model, settings.augment
        return cls(
            name=model.name,
            args=model.args,
            depths=[list(stages) for stages in depths],
            num_classes=model.num_classes,
            img_size=model.img_size,
            mean=augment.mean,
            std=augment.std,
            interpolation=augment.interpolation,
            eval_crop=augment.eval_crop,
        )


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
    """Write an artifact whole or not at all, in place of any older one, which is there until the new one is. Returns
    the manifest with its digest.

    Raises:
        LockedError: the claim is lost; the older one is as it was.
    """
    make_folder(folder.parent)
    for left in folder.parent.glob(f".{folder.name}-*"):  # by an attempt that died
        shutil.rmtree(left)
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    entry = write_pieces(aside / WEIGHTS, {key: whole(value.cpu()) for key, value in tensors.items()})
    manifest = manifest.model_copy(update={"digest": entry["sha256"]})
    text = json.dumps(manifest.model_dump(), indent=1) + "\n"
    write_hashed(aside / "manifest.json", [text.encode()])
    write_text(aside / MARKER, hashlib.sha256(text.encode()).hexdigest())
    try:
        (claim or Claim()).check()
    except LockedError:
        shutil.rmtree(aside)
        raise
    if folder.exists():
        shutil.rmtree(_older(folder), ignore_errors=True)
        folder.rename(_older(folder))
    aside.rename(folder)
    fsync_dir(folder.parent)
    shutil.rmtree(_older(folder), ignore_errors=True)
    return manifest


def _older(folder: Path) -> Path:
    """Where the artifact that is being replaced waits, between two renames, for the new one."""
    return folder.with_name(f".{folder.name}.older")


def _place(folder: Path) -> Path:
    """Where the artifact is: it was left aside if a save died between its renames."""
    return folder if folder.exists() or not _older(folder).exists() else _older(folder)


def load_manifest(folder: Path) -> Manifest:
    """
    Raises:
        ArtifactError: there is no artifact, or its manifest is not one.
    """
    place = _place(folder)
    try:
        return Manifest.model_validate_json(sealed(place))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"no artifact in {folder}: {error.filename} is missing") from None
    except OSError as error:
        raise ArtifactError(f"{error.filename}: {error.strerror}") from None
    except ValidationError as error:
        raise ArtifactError(f"{place / 'manifest.json'}: {error.errors()[0]['msg']}") from None


def verify_artifact(folder: Path) -> Manifest:
    """The manifest of an artifact, whose weights are hashed and not loaded.

    Raises:
        ArtifactError: missing, or not what its manifest says (file, expected and found hash in the message).
    """
    manifest = load_manifest(folder)
    file = _place(folder) / WEIGHTS
    try:
        plain_size(file)
        found = sha256(file)
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror}") from None
    if found != manifest.digest:
        raise ArtifactError(f"{file}: SHA-256 {found[:12]}…, expected {manifest.digest[:12]}…: damaged")
    return manifest


def load_artifact(folder: Path) -> tuple[dict[str, Tensor], Manifest]:
    """
    Raises:
        ArtifactError: as :func:`verify_artifact`.
    """
    manifest, file = verify_artifact(folder), _place(folder) / WEIGHTS
    try:
        return load_file(file), manifest
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror}") from None
    except SafetensorError as error:
        raise ArtifactError(f"{file}: {error}") from None


def check_module(folder: Path, *, recipe: str, meta: str, data: str) -> str | None:
    """Why the module in ``folder`` cannot join the assembly; None if it can."""
    try:
        return check_origin(load_manifest(folder), recipe=recipe, meta=meta, data=data)
    except ArtifactError as error:
        return str(error)


def check_origin(manifest: Manifest, *, recipe: str, meta: str | None, data: str) -> str | None:
    """What else than this an artifact grew from; None if nothing."""
    for name, wanted, found in (
        ("recipe", recipe, manifest.recipe),
        ("meta model", meta, manifest.meta),
        ("data", data, manifest.data),
    ):
        if wanted != found:
            return f"stale: it grew from another {name} ({str(found)[:12]}…, this run's is {str(wanted)[:12]}…)"
    return None
