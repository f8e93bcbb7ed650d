"""Artifacts: the output of a phase, as safetensors with timm's parameter names and a manifest of the lineage.

A module contains the parameters of its own blocks under the block indices of the **target**, so modules are assembled
by merging their state dicts. The folder contains ``weights.safetensors``, ``manifest.json``, and ``COMMITTED``, which
contains the SHA-256 of the manifest and is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from ..config import ModelConfig, TaskConfig, describe_changes
from ..errors import ArtifactError, LockedError, NonFiniteError
from ..files import (
    fsync_path,
    hash_file,
    make_folder,
    quote_path,
    regular_file_size,
    unreadable_error,
    write_and_hash,
    write_text,
)
from .checkpoint_verification import COMMIT_MARKER, read_committed_manifest
from .lease import Lease
from .sharded_tensors import full_tensor, write_sharded_tensors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "weights.safetensors"


class ModelSpec(BaseModel):
    """What is needed to rebuild a model and to evaluate it.

    Attributes:
        task: The recipe's task settings.
        model: The recipe's model settings.
        depths: Number of blocks, per module and stage.
        metadata: Other values that the task needs, such as the normalization of images.
        records: Properties of the records that it was trained on, such as the names of classes, if they are known.
        initial_weights: Pretrained weights that the training started from, if any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: TaskConfig
    model: ModelConfig
    depths: list[list[Annotated[int, Field(ge=0, le=10_000)]]]
    metadata: dict[str, Any]
    records: dict[str, Any] = {}
    initial_weights: str | None = None


@dataclass(frozen=True)
class Lineage:
    """What an artifact is trained from. Digests are SHA-256 in hexadecimal.

    Attributes:
        identity: Settings that determine what the phase computes, by key (:mod:`bigincubate.planning.identity`).
        data: Digest of the data set that the phase trains on.
        inputs: Digests of the weights that the phase reads, by artifact, such as ``meta`` or ``module/0``.
    """

    identity: dict[str, Any]
    data: str
    inputs: dict[str, str]


class ArtifactManifest(BaseModel):
    """Description of an artifact and its :class:`Lineage`. Digests are SHA-256 in hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    kind: Literal["model", "module"]
    phase: str
    module: int | None = None
    model: ModelSpec
    weights: Literal["raw", "ema"]
    identity: dict[str, Any]
    data: str
    inputs: dict[str, str] = {}
    digest: str = ""  # of weights.safetensors


def save_artifact(
    folder: Path, tensors: dict[str, Tensor], manifest: ArtifactManifest, lease: Lease | None = None
) -> ArtifactManifest:
    """Write an artifact atomically. An existing artifact is replaced only after the new one is complete.

    Returns:
        The manifest with the digest of the weights.

    Raises:
        LockedError: The lease was lost. An existing artifact is unchanged.
        NonFiniteError: A weight is not finite. An existing artifact is unchanged.
    """
    check_finite_weights(tensors, str(folder))
    make_folder(folder.parent)
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # from an attempt that was killed
        shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    entry = write_sharded_tensors(
        temporary / WEIGHTS_FILE, {key: full_tensor(value.cpu()) for key, value in tensors.items()}
    )
    manifest = manifest.model_copy(update={"digest": entry["sha256"]})
    text = json.dumps(manifest.model_dump(), indent=1) + "\n"
    write_and_hash(temporary / "manifest.json", [text.encode()])
    write_text(temporary / COMMIT_MARKER, hashlib.sha256(text.encode()).hexdigest())
    try:
        (lease or Lease()).check()
    except LockedError:
        shutil.rmtree(temporary)
        raise
    if folder.exists():
        shutil.rmtree(_replaced_path(folder), ignore_errors=True)
        folder.rename(_replaced_path(folder))
    temporary.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(_replaced_path(folder), ignore_errors=True)
    return manifest


def _replaced_path(folder: Path) -> Path:
    """Return the path of the old artifact between the two renames that replace it."""
    return folder.with_name(f".{folder.name}.older")


def _current_path(folder: Path) -> Path:
    """Return the path of the artifact: ``folder``, or the replaced one if a save was killed between its renames."""
    return folder if folder.exists() or not _replaced_path(folder).exists() else _replaced_path(folder)


def load_manifest(folder: Path) -> ArtifactManifest:
    """Return the manifest of an artifact.

    Raises:
        ArtifactError: There is no artifact, or its manifest is invalid.
        SystemResourceError: The manifest cannot be read.
    """
    current = _current_path(folder)
    try:
        return ArtifactManifest.model_validate_json(read_committed_manifest(current))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"no artifact in {quote_path(folder)}: {error.filename} is missing") from None
    except OSError as error:
        raise unreadable_error(error, current, ArtifactError) from None
    except ValidationError as error:
        raise ArtifactError(f"{current / 'manifest.json'}: {error.errors()[0]['msg']}") from None


def verify_artifact(folder: Path) -> ArtifactManifest:
    """Check the hash of an artifact's weights, without loading them, and return the manifest.

    Raises:
        ArtifactError: A file is missing, or its hash differs (the message contains the file and both hashes).
        SystemResourceError: A file cannot be read.
    """
    manifest = load_manifest(folder)
    file = _current_path(folder) / WEIGHTS_FILE
    try:
        regular_file_size(file)
        found = hash_file(file)
    except OSError as error:
        raise unreadable_error(error, file, ArtifactError) from None
    if found != manifest.digest:
        raise ArtifactError(f"{file} is damaged: SHA-256 {found[:12]}…, expected {manifest.digest[:12]}…")
    return manifest


def load_artifact(folder: Path) -> tuple[dict[str, Tensor], ArtifactManifest]:
    """Return the tensors and the manifest of an artifact.

    Raises:
        ArtifactError: See :func:`verify_artifact`.
        NonFiniteError: A weight is not finite.
    """
    manifest, file = verify_artifact(folder), _current_path(folder) / WEIGHTS_FILE
    try:
        from safetensors.torch import load_file

        tensors = load_file(file)
    except OSError as error:
        raise unreadable_error(error, file, ArtifactError) from None
    except SafetensorError as error:
        raise ArtifactError(f"{file}: {error}") from None
    check_finite_weights(tensors, str(folder))
    return tensors, manifest


def check_finite_weights(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that weights are finite.

    Args:
        tensors: The weights by name.
        source: Where they are from, for the message.

    Raises:
        NonFiniteError: A weight is not finite; the message names its tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteError(
                f"{source}: tensor {name!r} has values that are not finite, because training diverged; train it again"
                " with a lower train.lr"
            )


def check_artifact_lineage(folder: Path, expected: Lineage) -> str | None:
    """Return the reason why the artifact in ``folder`` cannot be used, or None if it can."""
    try:
        return check_lineage(load_manifest(folder), expected)
    except ArtifactError as error:
        return str(error)


def check_lineage(manifest: ArtifactManifest, expected: Lineage) -> str | None:
    """Return how the lineage of an artifact differs from the expected one, or None if it is the same."""
    if changed := describe_changes(manifest.identity, expected.identity, absent="default"):
        return f"stale: trained with other settings ({'; '.join(changed)})"
    found = {"data": manifest.data, **manifest.inputs}
    for name, digest in {"data": expected.data, **expected.inputs}.items():
        if digest != found.get(name):
            source = "meta model" if name == "meta" else name.replace("/", " ")
            return f"stale: trained from another {source} ({found.get(name, '')[:12]}…, this run has {digest[:12]}…)"
    return None
