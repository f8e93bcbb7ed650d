"""timm models of a given depth: the target, the meta model and every hybrid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...errors import ConfigError
from ..drop_path import replace_drop_path
from ..partition import Depths, Partition
from .families import family_of

# Set elsewhere in a recipe, or never: what timm's factory takes that `model.args` may not hold.
RESERVED = frozenset(
    {"depth", "depths", "num_blocks", "num_classes", "img_size", "drop_path_rate", "device", "dtype", "features_only"}
    | {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
)

T = TypeVar("T")


def build(
    name: str,
    depths: Depths,
    *,
    num_classes: int,
    img_size: int,
    args: Mapping[str, Any],
    device: str = "cpu",
) -> nn.Module:
    """A timm model of these depths with fresh weights, its drop-path replaced by `DropPath` with rate 0.

    Seed torch before: the initialisation draws from the default generator.

    Args:
        name: timm's name.
        depths: the model's depths, in the normal form.
        num_classes: outputs of the head.
        img_size: side of the square input in pixels; given to timm only where the constructor takes it.
        args: further arguments of timm's constructor, such as ``embed_dim`` or ``in_chans``.
        device: ``"cpu"``, or ``"meta"`` for a model of shapes alone.

    Raises:
        ConfigError: timm refuses an argument; the model is not supported; it is deeper than a family that is built as
            named allows.
    """
    family = family_of(name)
    partition = Partition(family, depths)
    stages = partition.stage_depths
    model = _create(name, args, stages, num_classes=num_classes, img_size=img_size, device=device)
    for container, depth in zip(family.containers(model), stages, strict=True):
        assert isinstance(container, nn.Sequential | nn.ModuleList)
        if depth > len(container):
            raise ConfigError(
                f"model {name!r} has {len(container)} blocks and timm builds it no deeper: the depths ask for {depth}, "
                "so take less or name a deeper model"
            )
        del container[depth:]
        for block in container:
            replace_drop_path(block)
    return model


def default_depths(name: str, args: Mapping[str, Any]) -> tuple[int, ...]:
    """Number of blocks of each stage of the model as timm knows it."""
    model = _create(name, args, None, num_classes=1, img_size=None, device="meta")
    return tuple(len(list(container.children())) for container in family_of(name).containers(model))


def block_costs(
    name: str, stage_depths: tuple[int, ...], *, img_size: int, args: Mapping[str, Any]
) -> tuple[tuple[int, ...], ...]:
    """Forward FLOPs of each block for one image, a tuple a stage, counted on the meta device.

    A multiply and an add are two FLOPs, and only matrix products and convolutions count (torch's flop counter).
    """
    family = family_of(name)
    model = build(name, (stage_depths,), num_classes=1, img_size=img_size, args=args, device="meta")
    image = torch.empty(1, int(args.get("in_chans", 3)), img_size, img_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _or_config_error(name, lambda: model(image))
    counts = counter.get_flop_counts()
    root = type(model).__name__
    return tuple(
        tuple(sum(counts[f"{root}.{family.block_path(stage, index)}"].values()) for index in range(depth))
        for stage, depth in enumerate(stage_depths)
    )


def _create(
    name: str,
    args: Mapping[str, Any],
    stages: tuple[int, ...] | None,
    *,
    num_classes: int,
    img_size: int | None,
    device: str,
) -> nn.Module:
    family = family_of(name)
    if taken := sorted(RESERVED & args.keys()):
        raise ConfigError(f"model.args.{taken[0]} is not an argument to give: the recipe sets it elsewhere, or never")
    kwargs = {**args, "num_classes": num_classes, "drop_path_rate": 0.0, "device": device}
    if family.takes_img_size and img_size is not None:
        kwargs["img_size"] = img_size
    if family.depth_argument and stages is not None:
        kwargs[family.depth_argument] = list(stages) if family.stages > 1 else stages[0]
    model: nn.Module = _or_config_error(name, lambda: timm.create_model(name, **kwargs))
    if any(hasattr(module, "set_lambda_init") for module in model.modules()):
        raise ConfigError(f"model {name!r}: its attention depends on a block's index, so blocks cannot change places")
    if model.state_dict().keys() - dict(model.named_parameters()).keys():
        raise ConfigError(f"model {name!r} keeps running statistics (batch norm), which no frozen module may")
    return model


def _or_config_error(name: str, act: Callable[[], T]) -> T:
    """timm refuses an argument with whatever it stumbles over: make it one line."""
    try:
        return act()
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"model {name!r} cannot be built with these arguments: {reason[0]}") from error
