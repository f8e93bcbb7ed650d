"""Load the model of an artifact, and export it as a folder that timm loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config import Phase
from ..errors import ArtifactError, ConfigError
from ..files import read_json, regular_file_size
from ..models import Partition
from ..models.vision import TimmFamily, find_timm_family
from ..storage.artifacts import ModelSpec, load_artifact
from ..storage.run_directory import RunDir
from .official_format import write_official

SPEC = "bigincubate"  # our part of an exported config.json
FILES = ("model.safetensors", "config.json")  # of an exported folder; the last one comes last


def best_artifact(run: RunDir) -> Path:
    """Return the artifact of a run's result: the fine-tuned model, or else the end-to-end model.

    Raises:
        ArtifactError: The run has neither yet.
    """
    phases: tuple[Phase, ...] = ("finetune", "end_to_end")
    for phase in phases:
        folder = run.phase(phase).artifact
        if (folder / "manifest.json").exists():
            return folder
    raise ArtifactError(f"{run.path} has no finished model yet; go on with: bigincubate run {run.recipe_file} ...")


def load_model(path: Path) -> tuple[nn.Module, ModelSpec]:
    """Load the model of a run directory, a phase's directory, an artifact, or an exported folder.

    Raises:
        ArtifactError: There is no complete model.
    """
    if (path / "config.json").exists():
        return _load_exported(path)
    if (path / "recipe.toml").exists():
        path = best_artifact(RunDir(path))
    elif (path / "artifact").is_dir():
        path = path / "artifact"
    if not path.exists():
        raise ArtifactError(f"{path}: no such directory")
    tensors, manifest = load_artifact(path)
    if manifest.kind != "model":
        raise ArtifactError(f"{path} is module {manifest.module}, a part of a model; give a run or a whole model")
    return with_weights(manifest.model, tensors, path), manifest.model


def with_weights(spec: ModelSpec, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """Build a model and load its weights.

    Args:
        spec: Describes the model.
        tensors: Its weights.
        source: Where they come from, for the error.

    Raises:
        ArtifactError: Names or shapes of the tensors are not those of the model.
    """
    family, depths = timm_family(spec), partition_of(spec).depths
    # shapes alone first: a specification that is no match for its weights costs no memory
    shapes = family.build(spec.model, depths, device="meta").state_dict()
    wanted = {name: tensor.shape for name, tensor in shapes.items()}
    if odd := sorted(wanted.items() ^ {(name, tensor.shape) for name, tensor in tensors.items()}):
        raise ArtifactError(f"{source} does not hold the model of its description: tensor {odd[0][0]!r} differs")
    model = family.build(spec.model, depths)
    model.load_state_dict(tensors)
    return model


def _load_exported(path: Path) -> tuple[nn.Module, ModelSpec]:
    from safetensors.torch import load_file

    config = read_json(path / "config.json")
    try:
        spec = ModelSpec.model_validate((config or {})[SPEC])
    except (KeyError, ValidationError):
        raise ArtifactError(f"{path / 'config.json'} was not written by `bigincubate export`") from None
    file = path / "model.safetensors"
    try:
        regular_file_size(file)
        return with_weights(spec, load_file(file), file), spec
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{file} does not hold the model of its config.json: {reason}") from None


def whole(folder: Path) -> bool:
    """Return whether an exported folder is complete."""
    return (folder / FILES[-1]).exists()


def export(source: Path, out: Path) -> str:
    """Export the model of ``source`` as a folder that timm loads.

    Returns:
        The Python code that loads it.

    Raises:
        ArtifactError: There is no complete model in ``source``.
        ConfigError: ``out`` has other files.
    """
    return write_folder(*load_model(source), out)


def export_official(source: Path, out: Path) -> None:
    """Export the model of ``source`` as a checkpoint of the official implementation.

    Raises:
        ArtifactError: There is no complete model in ``source``.
        ConfigError: ``out`` exists, or the official implementation has no such model.
    """
    model, spec = load_model(source)
    write_official(out, model.state_dict(), partition_of(spec))


def write_folder(model: nn.Module, spec: ModelSpec, out: Path) -> str:
    """Write a model as a folder that timm loads: ``model.safetensors`` and ``config.json``.

    Returns:
        The Python code that loads it.

    Raises:
        ConfigError: ``out`` has other files.
    """
    from timm.models import save_for_hf

    out = out.resolve()
    if out.exists() and (not out.is_dir() or ({file.name for file in out.iterdir()} - set(FILES) and not whole(out))):
        raise ConfigError(f"{out} exists and is not an exported model; choose another --out")
    size = [3, spec.model.img_size, spec.model.img_size]
    model.pretrained_cfg = {  # type: ignore[assignment]
        **getattr(model, "pretrained_cfg", {}),
        "input_size": size,
        "num_classes": spec.model.num_classes,
        "mean": spec.metadata["mean"],
        "std": spec.metadata["std"],
        "interpolation": spec.metadata["interpolation"],
        "crop_pct": spec.metadata["eval_crop"],
    }
    arguments = timm_arguments(spec)
    aside = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    save_for_hf(model, str(aside), model_args=arguments, safe_serialization=True)
    config = json.loads((aside / "config.json").read_text())
    config[SPEC] = spec.model_dump()
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    out.mkdir(exist_ok=True)
    for name in FILES:
        (aside / name).replace(out / name)
    aside.rmdir()
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    if depth := _cut(spec):  # timm has no argument for it
        return (
            f"model = timm.create_model({spec.model.name!r}, {shown}); model.blocks = model.blocks[:{depth}];"
            f" model.load_state_dict(safetensors.torch.load_file({str(out / FILES[0])!r}))"
        )
    overlay = f"dict(file={str(out / 'model.safetensors')!r}, num_classes={spec.model.num_classes})"
    return f"timm.create_model({spec.model.name!r}, pretrained=True, pretrained_cfg_overlay={overlay}, {shown})"


def _cut(spec: ModelSpec) -> int | None:
    """Return the number of blocks of a model whose depth timm takes no argument for, if it differs; else None."""
    family = timm_family(spec)
    if family.depth_argument:
        return None
    depth = sum(stages[0] for stages in spec.depths)
    return depth if (depth,) != family.default_depths(spec.model) else None


def timm_family(spec: ModelSpec) -> TimmFamily:
    """Return the family of a described model.

    Raises:
        ArtifactError: It is of another library, whose code is never run because a file names it.
    """
    if spec.model.library != "timm":
        raise ArtifactError(f"model.library = {spec.model.library!r}: only models of timm can be loaded and exported")
    return find_timm_family(spec.model.name)


def partition_of(spec: ModelSpec) -> Partition:
    """Return which module owns which tensor of a described model."""
    return Partition(timm_family(spec), tuple(tuple(stages) for stages in spec.depths))


def timm_arguments(spec: ModelSpec) -> dict[str, object]:
    """What ``timm.create_model`` needs to build this very model."""
    family, model = timm_family(spec), spec.model
    sizes = family.depth_kwargs(partition_of(spec).stage_depths) | family.size_kwargs(model)
    return {"num_classes": model.num_classes, **model.args, **sizes}
