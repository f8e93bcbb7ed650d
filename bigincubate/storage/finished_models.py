"""Finished models as sources of weights: where their files are, what identifies them, and what they cost."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, format_command
from ..files import check_is_file, hash_file, quote_path
from .artifacts import load_manifest
from .run_directory import RunDir

CONFIG_FILE = "config.json"  # of an exported folder, or one that transformers wrote
WEIGHTS_SUFFIXES = (".safetensors", ".bin")
LOCAL_NAME = re.compile(r"(?:timm:local-dir:|transformers:(?=[/~.]))(.+)")  # names of libraries for local folders


def best_artifact(run: RunDir) -> Path:
    """Return the artifact of a run's final model: the fine-tuned model, or otherwise the end-to-end model.

    Raises:
        ArtifactError: The run has neither yet.
    """
    for folder in (run.phase("finetune").artifact, run.phase("end_to_end").artifact):
        if (folder / "manifest.json").exists():
            return folder
    resume = format_command("run", run.recipe_file, "--run-dir", run.path)
    raise ArtifactError(f"{quote_path(run.path)} has no finished model yet; continue with: {resume}")


def find_artifact(path: Path) -> Path:
    """Return the artifact that a path means: that of a run's final model, of a phase, or the path itself.

    Raises:
        ArtifactError: The run has no final model yet, or there is no such directory.
    """
    if (path / "recipe.toml").exists():
        return best_artifact(RunDir(path))
    if (path / "artifact").is_dir():
        return path / "artifact"
    if not path.exists():
        raise ArtifactError(f"{path}: no such directory")
    return path


def is_hub_name(source: str) -> bool:
    """Return whether a pretrained model is the name of one in a hub, not a path."""
    return source.startswith(("timm:", "transformers:"))


def identify_weights(source: str) -> str:
    """Return what identifies pretrained weights, wherever they are.

    Args:
        source: A value of ``finetune.init``.

    Returns:
        The name of a model in a hub, or the SHA-256 (hexadecimal) of the weights in an artifact or a file. For a folder
        in the format of a model's library: that of the hashes of its weights and its ``config.json``.

    Raises:
        ArtifactError: There are no weights at this path.
    """
    local = LOCAL_NAME.match(source)
    if is_hub_name(source) and local is None:
        return source
    path = Path(local[1] if local else source)
    try:
        return _hash_weights(path)
    except OSError as error:
        raise ArtifactError(f"finetune.init = {source!r}: {quote_path(path)}: {error.strerror}") from None
    except ArtifactError as error:
        raise ArtifactError(f"finetune.init = {source!r}: {error}") from None


def _hash_weights(path: Path) -> str:
    """Return the SHA-256 of the weights in an artifact, a file, or a folder in the format of a model's library."""
    if not path.is_dir():
        check_is_file(path)
        return hash_file(path)
    if not (path / CONFIG_FILE).exists():
        return load_manifest(find_artifact(path)).digest
    files = [file for file in sorted(path.iterdir()) if file.suffix in WEIGHTS_SUFFIXES or file.name == CONFIG_FILE]
    for file in files:
        check_is_file(file)
    hashes = "".join(f"{file.name} {hash_file(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def describe_weights(source: str, identity: str) -> str:
    """Return a description of pretrained weights, given the value of `identify_weights`."""
    return source if source == identity else f"{source} (SHA-256 {identity})"


def describe_training(source: str) -> dict[str, Any]:
    """Return the origin of pretrained weights for ``plan.json``: ``source``, and ``flops``, their training FLOPs.

    The FLOPs are those of all phases that the final model of a run was trained in, and of the weights that the run
    started from. They are None if these are unknown, as for an exported folder.

    Args:
        source: A value of ``finetune.init``.
    """
    run, flops = RunDir(Path(source)), None
    if not is_hub_name(source) and run.recipe_file.exists():
        flops = _training_flops(run)
    return {"source": source, "flops": flops}


def _training_flops(run: RunDir) -> int | None:
    """Return the training FLOPs of a run's final model, or None if they are unknown."""
    plan, artifact = run.read_plan(), best_artifact(run)
    if plan is None:
        return None
    alone = artifact == run.phase("end_to_end").artifact
    rows = [row for row in plan["rows"] if (row["phase"] == "end_to_end") == alone]
    results = [run.phase(row["phase"], row["module"]).result for row in rows]
    before: int | None = 0
    if load_manifest(artifact).model.initial_weights is not None:
        before = (plan.get("initial_weights") or {"flops": None})["flops"]
    if before is None or not results or None in results:
        return None
    return before + sum(result["flops"] for result in results if result)
