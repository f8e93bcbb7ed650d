"""Find the committed checkpoints of a phase, and verify their files."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ArtifactError
from ..files import (
    MISSING_OR_WRONG_TYPE,
    hash_file,
    is_present,
    list_folder,
    read_json,
    read_small_file,
    regular_file_size,
)
from .sharded_tensors import ShardedTensorReader

STEP_PATTERN = re.compile(r"step-(\d{8,})", re.ASCII)
COMMIT_MARKER = "COMMITTED"
STATE_FILE = "state.json"
FileName = Annotated[str, Field(pattern=r"^(rank-[0-9]{5,}\.safetensors|state\.json)$")]  # never a path


class FileEntry(BaseModel):
    """Size and SHA-256 of a file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    size: int = Field(ge=0)  # bytes
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class CheckpointManifest(BaseModel):
    """The content of ``manifest.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal[1]
    step: int = Field(ge=0)
    digest: str  # of the phase: its identity keys, its data and the artifacts that it reads
    world: int = Field(ge=1)
    files: dict[FileName, FileEntry]

    def tensor_files(self, folder: Path) -> list[Path]:
        """Return the paths of the files with tensors of the checkpoint in ``folder``."""
        return [folder / name for name in self.files if name != STATE_FILE]


def parse_step(name: str) -> int | None:
    """Return the step in the name of a checkpoint; None for other names, also those with more leading zeros."""
    match = STEP_PATTERN.fullmatch(name)
    return int(match[1]) if match and name == f"step-{int(match[1]):08d}" else None


def find_committed(folder: Path) -> dict[int, Path]:
    """Return the committed checkpoints in a folder, by step. What has other names is ignored.

    Raises:
        OSError: The folder or a checkpoint in it cannot be read.
    """
    named = {step: path for path in list_folder(folder) if (step := parse_step(path.name)) is not None}
    return {step: path for step, path in named.items() if is_present(path / COMMIT_MARKER)}


def verify_checkpoint(folder: Path) -> str | None:
    """Return why a committed checkpoint is invalid (file, expected and found value), or None if it is valid.

    Files outside the directory are not opened, files without a hash are not read, and tensors are not loaded.

    Raises:
        OSError: A file cannot be read, so it is unknown whether it is damaged.
    """
    file = folder / "manifest.json"
    try:
        if folder.is_symlink():
            return f"{folder} is a symbolic link; refused"
        manifest = CheckpointManifest.model_validate_json(read_committed_manifest(folder))
        if (match := STEP_PATTERN.fullmatch(folder.name)) and int(match[1]) != manifest.step:
            return f"{file}: step {manifest.step}, expected {int(match[1])}"
        for name, entry in manifest.files.items():
            if (size := regular_file_size(folder / name)) != entry.size:
                return f"{folder / name}: {size} bytes, expected {entry.size}"
            if (found := hash_file(folder / name)) != entry.sha256:
                return f"{folder / name}: SHA-256 {found[:12]}…, expected {entry.sha256[:12]}…"
        state = read_json(folder / STATE_FILE)
        if state is None or state.get("step", manifest.step) != manifest.step:
            return f"{folder / STATE_FILE}: not the state of step {manifest.step}"
        ShardedTensorReader(manifest.tensor_files(folder))
    except OSError as error:
        if error.errno not in MISSING_OR_WRONG_TYPE:
            raise
        return describe_os_error(error, folder)
    except ValidationError as error:
        return f"{file}: invalid manifest: {error.errors()[0]['msg']}"
    except ArtifactError as error:
        return str(error)
    return None


def read_committed_manifest(folder: Path) -> bytes:
    """Return the content of ``manifest.json``, checked against the commit marker.

    Raises:
        OSError: The manifest or the marker is missing, or not a regular file.
        ArtifactError: The manifest differs from the hash in the marker.
    """
    file, marker = folder / "manifest.json", folder / COMMIT_MARKER
    if (size := regular_file_size(marker)) != 64:
        raise ArtifactError(f"{marker}: {size} bytes, expected 64")
    text, expected = read_small_file(file), marker.read_bytes().decode(errors="replace")
    if (found := hashlib.sha256(text).hexdigest()) != expected:
        raise ArtifactError(f"{file}: SHA-256 {found[:12]}…, expected {expected[:12]!r}…")
    return text


def describe_os_error(error: OSError, path: Path) -> str:
    """Return a message with the file (default ``path``), the reason and, if the disk is full, its free space."""
    text = f"{error.filename or path}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return text
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return f"{text} ({shutil.disk_usage(existing).free} bytes free)"
