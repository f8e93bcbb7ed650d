"""The supported families of timm models, as data.

A family says where a model keeps its blocks, how its constructor is told their number, and which tensors come before
the blocks (the stem) and after them (the tail). Everything else in this package is arithmetic on these rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ...errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """How one kind of timm model is laid out.

    Attributes:
        name: short name used in messages.
        covers: what a user calls these models.
        classes: names of the timm classes.
        depth_argument: constructor argument that takes the depth: ``"depth"`` (a number), ``"depths"`` (a number a
            stage) or None, where there is none: the model is built as named and its list of blocks cut.
        stages: number of stages; a flat model has one.
        block: path of a block, with ``{stage}`` and ``{block}`` (its index inside the stage).
        stem: first name components of the tensors that come before all blocks.
        tail: first name components of the tensors that come after all blocks.
        parity: what a block computes depends on its index in the stage modulo this number (Swin: every second block
            shifts its windows).
        takes_img_size: whether the constructor takes ``img_size``.
        drop_path_ramp: timm's stochastic depth: a linear ramp from 0 over all blocks, or one rate for all.
    """

    name: str
    covers: str
    classes: tuple[str, ...]
    depth_argument: str | None
    stages: int
    block: str
    stem: tuple[str, ...]
    tail: tuple[str, ...]
    parity: int = 1
    takes_img_size: bool = True
    drop_path_ramp: bool = True

    def block_path(self, stage: int, block: int) -> str:
        """Path of the block with this index inside its stage, such as ``layers.2.blocks.5``."""
        return self.block.format(stage=stage, block=block)

    def containers(self, model: nn.Module) -> list[nn.Module]:
        """The list of blocks of each stage of a timm model."""
        parent = self.block.removesuffix(".{block}")
        return [model.get_submodule(parent.format(stage=stage)) for stage in range(self.stages)]

    def count_blocks(self, names: Iterable[str]) -> tuple[int, ...]:
        """Number of blocks a stage of a model that has tensors of these names."""
        prefixes = [self.block.removesuffix("{block}").format(stage=stage) for stage in range(self.stages)]
        names = list(names)
        return tuple(
            len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
            for prefix in prefixes
        )


FAMILIES: tuple[Family, ...] = (
    Family(
        name="vit",
        covers="ViT, DeiT (plain or distilled) and DeiT III",
        classes=("VisionTransformer", "VisionTransformerDistilled"),
        depth_argument="depth",
        stages=1,
        block="blocks.{block}",
        stem=("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre"),
        tail=("norm", "attn_pool", "fc_norm", "head", "head_dist"),
    ),
    Family(
        name="swin",
        covers="Swin and Swin V2",
        classes=("SwinTransformer", "SwinTransformerV2"),
        depth_argument="depths",
        stages=4,
        block="layers.{stage}.blocks.{block}",
        stem=("patch_embed",),
        tail=("norm", "head"),
        parity=2,
    ),
    Family(
        name="convnext",
        covers="ConvNeXt (V1 and V2)",
        classes=("ConvNeXt",),
        depth_argument="depths",
        stages=4,
        block="stages.{stage}.blocks.{block}",
        stem=("stem",),
        tail=("norm_pre", "head"),  # timm applies ConvNeXt's norm_pre after the stages, before pooling
        takes_img_size=False,
    ),
    Family(
        name="mixer",
        covers="MLP-Mixer (ResMLP and gMLP too)",
        classes=("MlpMixer",),
        depth_argument=None,
        stages=1,
        block="blocks.{block}",
        stem=("stem",),
        tail=("norm", "head"),
        drop_path_ramp=False,
    ),
)


def family_of(name: str, model: nn.Module | None = None) -> Family:
    """The family of a timm model.

    Args:
        name: timm's name, with or without a pretrained tag.
        model: the model if it is built already; without it, its class is found by building it on the meta device.

    Raises:
        ConfigError: timm does not know the name (says which ones are near), or the family is not supported (lists
            those that are).
    """
    class_name = type(model).__name__ if model is not None else _class_name(name)
    for family in FAMILIES:
        if class_name in family.classes:
            return family
    supported = "; ".join(family.covers for family in FAMILIES)
    raise ConfigError(f"model {name!r} (timm class {class_name}) is not supported. Supported are: {supported}")


@lru_cache
def _class_name(name: str) -> str:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`timm.list_models()` lists them"
        raise ConfigError(f"timm has no model {name!r}; {hint}")
    return type(timm.create_model(timm.models.get_arch_name(name), device="meta")).__name__
