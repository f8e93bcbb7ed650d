"""Read and write checkpoints of the official implementation (github.com/LeapLabTHU/Deep-Incubation).

Such a file is a dictionary written by ``torch.save``. Its ``model_stages`` is a list of one state dict per module, with
the stem in the first, norm and head in the last, and block indices that start at zero in each module (local names of
`Partition`). All other entries (optimizer, scheduler, a second copy of the model) are ignored. Only tensors and plain
containers are unpickled, so reading a file cannot run code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError, ConfigError
from ..files import check_is_file, name_in_errors
from ..models.base import ModelFamily
from ..models.partition import Partition

# tensor names of a plain ViT, the only model of the official implementation
NAMES = re.compile(
    r"pos_embed|cls_token|(patch_embed\.proj|norm|head|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))"
    r"\.(weight|bias)"
)


def read_torch(file: Path) -> Any:
    """Read a file that ``torch.save`` wrote, with tensors on the CPU.

    Raises:
        ArtifactError: The file is missing or damaged, or reading it would run code.
    """
    try:
        check_is_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file can raise any error in the unpickler
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ArtifactError(f"{file}: refused, because reading it would run code ({code[1]})") from None
        raise ArtifactError(f"{file} is damaged, or was not written by torch.save") from None


def read_stages(file: Path) -> list[dict[str, Tensor]]:
    """Read the state dict of each module, with local names.

    Raises:
        ArtifactError: See `read_torch`; or the file is another kind of checkpoint.
    """
    if (stages := stages_of(read_torch(file))) is None:
        raise ArtifactError(
            f"{file} has no list model_stages, so it is not a checkpoint of the official implementation"
        )
    return stages


def stages_of(checkpoint: Any) -> list[dict[str, Tensor]] | None:
    """Return the state dicts of the modules in a loaded checkpoint, or None if it has none."""
    stages = checkpoint.get("model_stages") if isinstance(checkpoint, dict) else None
    return stages if isinstance(stages, list) and stages and all(map(is_state_dict, stages)) else None


def is_state_dict(value: Any) -> bool:
    """Return whether a value is a dictionary of named tensors."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def join_stages(stages: Sequence[Mapping[str, Tensor]], family: ModelFamily) -> dict[str, Tensor]:
    """Merge the state dicts of modules into that of one model, with timm's names.

    Raises:
        ArtifactError: A tensor does not belong to its module.
        ConfigError: A module has no blocks.
    """
    partition = Partition(family, tuple(family.count_blocks(stage) for stage in stages))
    return {
        partition.to_global_name(module, name): tensor
        for module, stage in enumerate(stages)
        for name, tensor in stage.items()
    }


def write_official(out: Path, tensors: Mapping[str, Tensor], partition: Partition) -> None:
    """Write a model as a checkpoint of the official implementation.

    The options ``--finetune``, ``--meta_model`` and ``--incubation_models`` of the official implementation load it.

    Raises:
        ConfigError: ``out`` exists, or the model is not a plain ViT.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")
    required = ("cls_token", "norm.weight", "head.weight", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias")
    unexpected = [name for name in tensors if not NAMES.fullmatch(name)]
    missing = [name for name in required if name not in tensors]
    if unexpected or missing:
        problem = f"unexpected tensor {unexpected[0]!r}" if unexpected else f"missing tensor {missing[0]!r}"
        raise ConfigError(f"the official implementation supports only plain ViTs, but this model has {problem}")
    stages: list[dict[str, Tensor]] = [{} for _ in range(partition.modules)]
    for name, tensor in tensors.items():
        module, local = partition.to_local_name(name)
        stages[module][local] = tensor.detach().cpu().clone()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.unfinished")
    try:
        with name_in_errors(temporary):
            _save(stages, temporary)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _save(stages: list[dict[str, Tensor]], path: Path) -> None:
    """Write a file with ``torch.save``.

    Raises:
        OSError: It cannot be written, for example because the disk is full.
    """
    try:
        with path.open("wb") as file:  # for a path, torch writes in C++, and the error does not say the cause
            torch.save({"model_stages": stages}, file)
    except RuntimeError as error:
        # the end of the archive, which torch also writes after an error, may have failed as well
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
