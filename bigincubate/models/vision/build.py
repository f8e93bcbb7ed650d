"""Build timm models of a given depth: the target, the meta model and every hybrid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from timm.layers import Conv2dSame, StdConv2dSame, resample_abs_pos_embed
from torch import Tensor, nn

from ...config import ModelConfig
from ...errors import ConfigError, format_count
from ..base import Depths, ModelFamily, SkipMetaInitialization, explain_argument_errors
from ..drop_path import replace_drop_path
from ..partition import Partition
from .mimetic import initialize_mimetic
from .subset_drop_path import compute_last_block_for_cls_token_only, use_subset_drop_path

# arguments of `timm.create_model` that `model.args` must not have: other keys set them, or they are not supported
RESERVED = frozenset(
    {"depth", "depths", "num_blocks", "num_classes", "img_size", "drop_path_rate", "device", "dtype", "features_only"}
    | {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
)
SMOKE_CLASSES = 10  # number of classes of the generated data


@dataclass(frozen=True, kw_only=True)
class TimmFamily(ModelFamily):
    """A family of timm models.

    Attributes:
        classes: Names of the timm classes.
        depth_argument: Constructor argument for the depth: ``"depth"`` (a number), ``"depths"`` (one number per stage),
            or None if there is none: blocks beyond the requested depth are then deleted.
        takes_img_size: Whether the constructor takes ``img_size``.
        zeroed_outputs: For `residual_outputs`: patterns of submodule paths, by the class name of a block. These are
            the norms in blocks that normalize *after* the branch, and the last projections in all other blocks.
        smoke_args: Constructor arguments that make a model narrow.
    """

    library: str = "timm"
    classes: tuple[str, ...]
    depth_argument: str | None
    takes_img_size: bool = True
    zeroed_outputs: Mapping[str, tuple[str, ...]] = field(hash=False)
    smoke_args: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def build(self, model: ModelConfig, depths: Depths, *, device: str = "cpu") -> nn.Module:
        """Build a timm model of these depths; see `ModelFamily.build`.

        Raises:
            ConfigError: timm rejects an argument, the model is not supported, or the depths are larger than the
                model's and its constructor has no argument for the depth.
        """
        stages = Partition(self, depths).stage_depths
        built = self._create(model, stages, device)
        for container, depth in zip(self._containers(built), stages, strict=True):
            assert isinstance(container, nn.Sequential | nn.ModuleList)
            if depth > len(container):
                raise ConfigError(
                    f"model {model.name!r} has {format_count(len(container), 'block')} and cannot be built deeper, but"
                    f" the depths need {depth}: use fewer blocks or choose a deeper model"
                )
            del container[depth:]
            for block in container:
                replace_drop_path(block)
        return built

    def widths(self, model: nn.Module) -> tuple[int, ...]:
        """Return the numbers of channels that timm lists for the blocks or stages."""
        return tuple(dict.fromkeys(int(stage["num_chs"]) for stage in getattr(model, "feature_info", ())))

    def default_depths(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the number of blocks per stage that timm uses for this model."""
        built = self._create(model, None, "meta")
        return tuple(len(list(container.children())) for container in self._containers(built))

    def example_inputs(self, model: ModelConfig, count: int, device: str) -> Tensor:
        """Return black images, ``[count, channels, img_size, img_size]`` float32."""
        return torch.zeros(count, int(model.args.get("in_chans", 3)), model.img_size, model.img_size, device=device)

    def check_input_size(self, model: ModelConfig) -> None:
        """Check that the model reads every pixel: timm drops those that do not fill a patch without a warning.

        Raises:
            ConfigError: It does not; the message has the nearest sizes that it reads completely.
        """
        with explain_argument_errors(model.name):
            dropped, strides = find_dropped_pixels(
                self.build(model, ((1,) * self.stages,), device="meta"), self.example_inputs(model, 1, "meta")
            )
        if dropped:
            below = model.img_size // strides * strides
            sizes = " or ".join(str(size) for size in (below, below + strides) if size)
            raise ConfigError(
                f"model.img_size = {model.img_size}: {model.name} would ignore pixels, because its layer {dropped}"
                f" reads whole patches only; use {sizes}"
            )

    def residual_outputs(self, block: nn.Module) -> list[nn.Module]:
        """Return the last layers of the residual branches; see `ModelFamily.residual_outputs`."""
        kind = type(block).__name__
        if kind not in self.zeroed_outputs:
            raise ConfigError(
                f"init = 'grow' or 'scaled' does not support blocks of class {kind} (it supports"
                f" {', '.join(self.zeroed_outputs)}): choose 'boundary' or 'fresh', and 'plain' for end_to_end.init"
            )
        outputs = []
        for pattern in self.zeroed_outputs[kind]:
            found = [child for path, child in block.named_modules() if fnmatchcase(path, pattern)]
            assert found, f"timm's {kind} has no {pattern}"
            outputs += found
        return outputs

    def initialize_mimetic(self, model: nn.Module, partition: Partition) -> None:
        """Initialize attention and position embeddings; see `ModelFamily.initialize_mimetic`."""
        initialize_mimetic(model, partition)

    def adapt_state(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors, with learned position embeddings resampled to the patch grid of ``model``.

        Uses timm's bicubic resampling, which does not change the embeddings of class and register tokens.

        Args:
            tensors: All or some tensors of a model, by name.
            model: A model with another image size; it may be on the meta device.
        """
        resampled = dict(tensors)
        before, after = tensors.get("pos_embed"), model.state_dict().get("pos_embed")
        if before is not None and after is not None and before.shape != after.shape:
            grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
            prefix_tokens = after.shape[1] - math.prod(grid)
            resampled["pos_embed"] = resample_abs_pos_embed(before, new_size=grid, num_prefix_tokens=prefix_tokens)
        return resampled

    def smoke_overrides(self, model: ModelConfig, *, larger_inputs: bool) -> dict[str, Any]:
        """Return settings for a narrow model on small images.

        The side of an image is two patches (three with ``larger_inputs``), or 32 (64) pixels for models with stages.
        """
        if self.stages > 1:
            size = 64 if larger_inputs else 32  # the last stage divides it by 32
        else:
            modules = self._create(model, None, "meta").modules()
            patch: Any = next(module.feat_ratio for module in modules if hasattr(module, "feat_ratio"))
            size = patch() * (3 if larger_inputs else 2)
        return {"img_size": size, "num_classes": SMOKE_CLASSES, "args": dict(self.smoke_args)}

    def choose_attention(self, model: nn.Module, device: torch.device, precision: str) -> None:
        """Disable torch's fused attention on CPUs in bf16.

        There, two matrix products and a softmax take a third of the time (197 tokens, forward and backward pass;
        `benchmarks/attention.py`), but the softmax is kept for the backward pass.

        Args:
            model: A timm model.
            device: The device that it runs on.
            precision: ``"fp32"`` or ``"bf16"``.
        """
        if device.type == "cpu" and precision == "bf16":
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # type: ignore[assignment]

    def use_subset_drop_path(self, model: nn.Module, partition: Partition) -> None:
        """Compute residual branches only for the samples that stochastic depth keeps."""
        use_subset_drop_path(model, partition)

    def compute_last_block_for_cls_token_only(self, model: nn.Module, partition: Partition) -> None:
        """Compute only the class token in the last block, if the head reads nothing else."""
        compute_last_block_for_cls_token_only(model, partition)

    def depth_kwargs(self, stages: tuple[int, ...]) -> dict[str, Any]:
        """Return the constructor argument for these numbers of blocks per stage, if there is one."""
        if not self.depth_argument:
            return {}
        return {self.depth_argument: list(stages) if self.stages > 1 else stages[0]}

    def size_kwargs(self, model: ModelConfig) -> dict[str, Any]:
        """Return the constructor argument for the image size, if there is one."""
        return {"img_size": model.img_size} if self.takes_img_size else {}

    def _containers(self, model: nn.Module) -> list[nn.Module]:
        """Return the list of blocks of each stage."""
        parent = self.block.removesuffix(".{block}")
        return [model.get_submodule(parent.format(stage=stage)) for stage in range(self.stages)]

    def _create(self, model: ModelConfig, stages: tuple[int, ...] | None, device: str) -> nn.Module:
        """Create a timm model with these numbers of blocks per stage; None for timm's default."""
        if reserved := sorted(RESERVED & model.args.keys()):
            raise ConfigError(
                f"model.args.{reserved[0]}: remove it; it is set by another key of the recipe, or is not supported"
            )
        kwargs = {**model.args, "num_classes": model.num_classes, "drop_path_rate": 0.0, "device": device}
        kwargs |= self.size_kwargs(model) | ({} if stages is None else self.depth_kwargs(stages))
        with explain_argument_errors(model.name), SkipMetaInitialization():
            built: nn.Module = timm.create_model(model.name, **kwargs)
        check_timm_model(built, model.name)
        return built


def find_dropped_pixels(model: nn.Module, inputs: Tensor) -> tuple[str | None, int]:
    """Find a strided convolution that does not read the last rows or columns of its input.

    Args:
        model: A model on the meta device.
        inputs: A batch of inputs on the meta device.

    Returns:
        The name of the first such layer, or None; and the product of the strides of all convolutions.
    """
    dropped: list[str] = []
    strided = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and max(module.stride) > 1
        and not isinstance(module, Conv2dSame | StdConv2dSame)  # these pad whatever the input needs
    }

    def watch(name: str, convolution: nn.Conv2d, given: tuple[Tensor, ...]) -> None:
        for axis, side in enumerate(given[0].shape[-2:]):
            kernel, stride = convolution.kernel_size[axis], convolution.stride[axis]
            padding = int(convolution.padding[axis])  # not "same", which torch refuses for strided convolutions
            if (side + 2 * padding - convolution.dilation[axis] * (kernel - 1) - 1) % stride > padding:
                dropped.append(name)

    handles = [
        module.register_forward_pre_hook(lambda module, given, name=name: watch(name, module, given))
        for name, module in strided.items()
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return (dropped[0] if dropped else None), math.prod(module.stride[0] for module in strided.values())


def check_timm_model(model: nn.Module, name: str) -> None:
    """Reject a model whose blocks depend on their index, or that has running statistics.

    Args:
        model: A timm model.
        name: Its name for messages.

    Raises:
        ConfigError: Its modules cannot be trained separately.
    """
    if any(hasattr(module, "set_lambda_init") for module in model.modules()):
        raise ConfigError(
            f"model {name!r} is not supported: its attention depends on the index of the block, which changes with the"
            " depths of earlier modules"
        )
    if model.state_dict().keys() - dict(model.named_parameters()).keys():
        raise ConfigError(
            f"model {name!r} is not supported: it has running statistics (batch norm), which would change in frozen"
            " modules"
        )
