"""The supported families of timm models."""

from __future__ import annotations

import difflib
from functools import lru_cache

import timm
from torch import nn

from ...errors import ConfigError
from ..base import SkipMetaInitialization
from .build import TimmFamily

FAMILIES: tuple[TimmFamily, ...] = (
    TimmFamily(
        name="vit",
        covers="ViT, DeiT (plain or distilled) and DeiT III",
        classes=("VisionTransformer", "VisionTransformerDistilled"),
        depth_argument="depth",
        stages=1,
        block="blocks.{block}",
        stem=("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre"),
        tail=("norm", "attn_pool", "fc_norm", "head", "head_dist"),
        zeroed_outputs={
            "Block": ("attn.proj", "mlp.fc2"),
            "ResPostBlock": ("norm1", "norm2"),
            "ParallelScalingBlock": ("*out_proj",),
            "ParallelThingsBlock": ("attns.*.attn.proj", "ffns.*.mlp.fc2"),
        },
        smoke_args={"embed_dim": 32, "num_heads": 2},
    ),
    TimmFamily(
        name="swin",
        covers="Swin and Swin V2",
        classes=("SwinTransformer", "SwinTransformerV2"),
        depth_argument="depths",
        stages=4,
        block="layers.{stage}.blocks.{block}",
        stem=("patch_embed",),
        tail=("norm", "head"),
        parity=2,  # every second block shifts its windows
        zeroed_outputs={
            "SwinTransformerBlock": ("attn.proj", "mlp.fc2"),
            "SwinTransformerV2Block": ("norm1", "norm2"),
        },
        smoke_args={"embed_dim": 8, "num_heads": [1, 2, 4, 8], "window_size": 2},
    ),
    TimmFamily(
        name="convnext",
        covers="ConvNeXt (V1 and V2)",
        classes=("ConvNeXt",),
        depth_argument="depths",
        stages=4,
        block="stages.{stage}.blocks.{block}",
        stem=("stem",),
        tail=("norm_pre", "head"),  # timm applies ConvNeXt's norm_pre after the stages, before pooling
        takes_img_size=False,
        zeroed_outputs={"ConvNeXtBlock": ("mlp.fc2",)},
        smoke_args={"dims": [8, 16, 32, 64]},
    ),
    TimmFamily(
        name="mixer",
        covers="MLP-Mixer (ResMLP and gMLP too)",
        classes=("MlpMixer",),
        depth_argument=None,
        stages=1,
        block="blocks.{block}",
        stem=("stem",),
        tail=("norm", "head"),
        drop_path_ramp=False,
        zeroed_outputs={
            "MixerBlock": ("mlp_tokens.fc2", "mlp_channels.fc2"),
            "ResBlock": ("linear_tokens", "mlp_channels.fc2"),
            "SpatialGatingBlock": ("mlp_channels.fc2",),
        },
    ),
)


def find_timm_family(name: str, model: nn.Module | None = None) -> TimmFamily:
    """Return the family of a timm model.

    Args:
        name: timm's name, with or without a pretrained tag.
        model: The model, if it exists. Otherwise its class is determined by building it on the meta device.

    Raises:
        ConfigError: timm has no model of this name (the message suggests similar names), or its family is not
            supported (the message lists the supported ones).
    """
    class_name = type(model).__name__ if model is not None else _find_class_name(name)
    for family in FAMILIES:
        if class_name in family.classes:
            return family
    supported = "; ".join(family.covers for family in FAMILIES)
    raise ConfigError(f"model {name!r} (timm class {class_name}) is not supported. Supported are: {supported}")


@lru_cache
def _find_class_name(name: str) -> str:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`timm.list_models()` lists all names"
        raise ConfigError(f"timm has no model {name!r}; {hint}")
    with SkipMetaInitialization():
        return type(timm.create_model(timm.models.get_arch_name(name), device="meta")).__name__
