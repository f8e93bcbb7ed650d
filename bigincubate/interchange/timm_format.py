"""Write models in timm's format, and the code with which timm loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..models.vision.families import find_timm_family
from ..storage.artifacts import ModelSpec
from .load_code import Place

# keys of timm's ``pretrained_cfg`` -> keys in the metadata of an artifact
METADATA = {"mean": "mean", "std": "std", "interpolation": "interpolation", "crop_pct": "eval_crop"}
# the only keys that describe the architecture; the others describe timm's own weights: their origin, their license, and
# the size and crop to test them with
ARCHITECTURE_KEYS = ("architecture", "fixed_input_size", "first_conv", "classifier")


def write_timm_files(model: nn.Module, spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Write ``model.safetensors`` and ``config.json`` as timm does, and return the configuration."""
    from timm.models import save_for_hf

    known: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}))
    model.pretrained_cfg = {  # type: ignore[assignment]
        **{key: known[key] for key in ARCHITECTURE_KEYS if key in known},
        "input_size": [3, spec.model.img_size, spec.model.img_size],
        "num_classes": spec.model.num_classes,
        "crop_mode": "center",
        **{key: spec.metadata[name] for key, name in METADATA.items() if name in spec.metadata},
        **({"description": f"initialized from {spec.initial_weights}"} if spec.initial_weights else {}),
    }
    names = spec.records.get("classes")
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": names} if isinstance(names, list) and len(names) == model.num_classes else None,
        model_args=timm_arguments(spec),
        safe_serialization=True,
    )
    return json.loads((folder / "config.json").read_text())


def timm_code(spec: ModelSpec, place: Place) -> list[str]:
    """Return the Python code that loads an exported model with the input size and normalization of its config.json."""
    if depth := _truncated_depth(spec):  # timm has no argument for the depth
        return [
            "import json, safetensors.torch, timm",
            *place.imports,
            f"config = json.load(open({place.file('config.json')}))",
            "model = timm.create_model(config['architecture'], pretrained_cfg=config['pretrained_cfg'],"
            " **config['model_args'])",
            f"del model.blocks[{depth}:]",
            f"model.load_state_dict(safetensors.torch.load_file({place.file('model.safetensors')}))",
        ]
    name = f"{'hf-hub' if place.on_hub else 'local-dir'}:{place.name}"
    return ["import timm", f"model = timm.create_model({name!r}, pretrained=True)"]


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
