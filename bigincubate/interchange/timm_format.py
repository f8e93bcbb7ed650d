"""Write models in timm's format, and build the arguments with which ``timm.create_model`` loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..models.vision.families import find_timm_family
from ..storage.artifacts import ModelSpec

# keys of timm's ``pretrained_cfg`` -> keys in the metadata of an artifact
METADATA = {"mean": "mean", "std": "std", "interpolation": "interpolation", "crop_pct": "eval_crop"}


def write_timm_files(model: nn.Module, spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Write ``model.safetensors`` and ``config.json`` as timm does, and return the configuration."""
    from timm.models import save_for_hf

    model.pretrained_cfg = {  # type: ignore[assignment]
        **getattr(model, "pretrained_cfg", {}),
        "input_size": [3, spec.model.img_size, spec.model.img_size],
        "num_classes": spec.model.num_classes,
        **{key: spec.metadata[name] for key, name in METADATA.items() if name in spec.metadata},
    }
    save_for_hf(model, str(folder), model_args=timm_arguments(spec), safe_serialization=True)
    return json.loads((folder / "config.json").read_text())


def timm_snippet(spec: ModelSpec, weights: Path) -> str:
    """Return the Python code that loads an exported model."""
    if depth := _truncated_depth(spec):  # timm has no argument for the depth
        arguments = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(spec).items())
        return (
            f"model = timm.create_model({spec.model.name!r}, {arguments}); model.blocks = model.blocks[:{depth}];"
            f" model.load_state_dict(safetensors.torch.load_file({str(weights)!r}))"
        )
    # with the input size and the normalization of config.json, not those of the original checkpoint
    return f"timm.create_model({f'local-dir:{weights.parent}'!r}, pretrained=True)"


def timm_arguments(spec: ModelSpec) -> dict[str, object]:
    """Return the arguments with which ``timm.create_model`` builds the model."""
    family, model = find_timm_family(spec.model.name), spec.model
    stage_depths = tuple(sum(column) for column in zip(*spec.depths, strict=True))
    return {
        "num_classes": model.num_classes,
        **model.args,
        **family.depth_kwargs(stage_depths),
        **family.size_kwargs(model),
    }


def _truncated_depth(spec: ModelSpec) -> int | None:
    """Return the number of blocks if timm needs an argument for it but has none; otherwise None."""
    family = find_timm_family(spec.model.name)
    depth = sum(stages[0] for stages in spec.depths)
    return None if family.depth_argument or (depth,) == family.default_depths(spec.model) else depth
