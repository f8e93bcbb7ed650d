"""Load the model of an artifact, and export it as a folder that timm loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import PHASES, Recipe
from ..errors import ArtifactError, ConfigError, format_command
from ..files import quote_path, read_json, regular_file_size
from ..models.library import find_family
from ..models.partition import Partition
from ..storage.artifacts import ModelSpec, check_finite_weights, load_artifact
from ..storage.run_directory import EXPORTED_FILES, RunDir, is_complete_export
from .official_format import write_official
from .timm_format import timm_snippet, write_timm_files

SPEC = "bigincubate"  # key of the ModelSpec in an exported config.json


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


def load_model(path: Path) -> tuple[nn.Module, ModelSpec]:
    """Load the model of a run directory, a phase's directory, an artifact, or an exported folder.

    Raises:
        ArtifactError: There is no complete model.
    """
    if (path / "config.json").exists():
        return _load_exported(path)
    recipe = None
    if (path / "recipe.toml").exists():
        recipe = RunDir(path).load_recipe()
        path = best_artifact(RunDir(path))
    elif (path / "artifact").is_dir():
        path = path / "artifact"
    if not path.exists():
        raise ArtifactError(f"{path}: no such directory")
    tensors, manifest = load_artifact(path)
    if manifest.kind != "model":
        raise ArtifactError(f"{path} is module {manifest.module}, a part of a model; give a run or a full model")
    _check_trusted_code(manifest.model, path, recipe)
    return with_weights(manifest.model, tensors, path), manifest.model


def with_weights(spec: ModelSpec, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """Build a model and load its weights.

    Args:
        spec: Description of the model.
        tensors: The weights.
        source: Path of the weights, for the error message.

    Raises:
        ArtifactError: Names or shapes of the tensors do not match the model.
        NonFiniteError: A weight is not finite.
    """
    check_finite_weights(tensors, str(source))
    family, depths = find_family(spec.model), partition_of(spec).depths
    # compare shapes first, so that a specification that does not fit its weights allocates nothing
    shapes = family.build(spec.model, depths, device="meta").state_dict()
    expected = {name: tensor.shape for name, tensor in shapes.items()}
    if different := sorted(expected.items() ^ {(name, tensor.shape) for name, tensor in tensors.items()}):
        raise ArtifactError(
            f"{source} does not hold the model of its description: tensor {different[0][0]!r} is missing, unexpected or"
            " of another shape"
        )
    model = family.build(spec.model, depths)
    model.load_state_dict(tensors)
    return model


def _load_exported(path: Path) -> tuple[nn.Module, ModelSpec]:
    config = read_json(path / "config.json")
    try:
        spec = ModelSpec.model_validate((config or {})[SPEC])
    except (KeyError, ValidationError):
        raise ArtifactError(f"{path / 'config.json'} was not written by `bigincubate export`") from None
    file = path / "model.safetensors"
    _check_trusted_code(spec, file, None)
    try:
        regular_file_size(file)
        return with_weights(spec, load_file(file), file), spec
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{file} does not hold the model of its config.json: {reason}") from None


def export(source: Path, out: Path) -> str:
    """Export the model of ``source`` as a folder. A model from timm can be loaded with timm.

    Returns:
        Python code that loads the model.

    Raises:
        ArtifactError: There is no complete model in ``source``.
        ConfigError: ``out`` contains other files.
    """
    return write_folder(*load_model(source), out)


def export_official(source: Path, out: Path) -> None:
    """Export the model of ``source`` as a checkpoint of the official implementation.

    Raises:
        ArtifactError: There is no complete model in ``source``.
        ConfigError: ``out`` exists, or the official implementation does not support the model.
    """
    model, spec = load_model(source)
    write_official(out, model.state_dict(), partition_of(spec))


def _has_only_exported_files(folder: Path) -> bool:
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= set(EXPORTED_FILES)


def write_folder(model: nn.Module, spec: ModelSpec, out: Path) -> str:
    """Write a model as ``model.safetensors`` and ``config.json``, in timm's format for a timm model.

    Returns:
        Python code that loads the model.

    Raises:
        ConfigError: ``out`` contains other files.
    """
    out = out.resolve()
    if out.exists() and not is_complete_export(out) and not _has_only_exported_files(out):
        raise ConfigError(f"{out} exists and is not an exported model; choose another --out")
    temporary = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    timm = spec.model.library == "timm"
    if timm:
        config = write_timm_files(model, spec, temporary)
    else:
        temporary.mkdir(parents=True)
        config = {}
        save_file(model.state_dict(), temporary / EXPORTED_FILES[0])
    (temporary / EXPORTED_FILES[1]).write_text(json.dumps({**config, SPEC: spec.model_dump()}, indent=2) + "\n")
    shutil.copymode(temporary / EXPORTED_FILES[1], temporary / EXPORTED_FILES[0])  # safetensors ignores the umask
    out.mkdir(exist_ok=True)
    for name in EXPORTED_FILES:
        (temporary / name).replace(out / name)
    temporary.rmdir()
    if timm:
        return timm_snippet(spec, out)
    return f"import safetensors.torch; tensors = safetensors.torch.load_file({str(out / EXPORTED_FILES[0])!r})"


def partition_of(spec: ModelSpec) -> Partition:
    """Return the partition of a described model into modules."""
    return Partition(find_family(spec.model), tuple(tuple(stages) for stages in spec.depths))


def _check_trusted_code(spec: ModelSpec, source: Path, recipe: Recipe | None) -> None:
    """Check that a model file names no code outside this package that the recipe of its run does not name.

    Raises:
        ArtifactError: The file names such code; the message contains the names.
    """
    tasks = {recipe.settings(phase).task.name for phase in PHASES} if recipe else set()
    trusted = {recipe.model.library, *tasks} if recipe else set()
    if foreign := sorted(name for name in {spec.model.library, spec.task.name} - trusted if ":" in name):
        raise ArtifactError(
            f"{source} needs code outside this package ({', '.join(foreign)}), which is loaded only if a recipe names"
            " it; give the run directory instead"
        )
