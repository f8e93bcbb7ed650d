"""Moving the tensors of modules between models of different depths, and what a fresh module starts from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, cast

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ..errors import ArtifactError, ConfigError
from .partition import Partition

# What to zero so that a block adds nothing to its residual stream, by timm's class of the block (patterns of paths).
# Blocks that normalise *after* the branch need the norm's scale and shift zeroed, all others the last projection.
RESIDUAL_OUTPUTS: dict[str, tuple[str, ...]] = {
    "Block": ("attn.proj", "mlp.fc2"),
    "ResPostBlock": ("norm1", "norm2"),
    "ParallelScalingBlock": ("*out_proj",),
    "ParallelThingsBlock": ("attns.*.attn.proj", "ffns.*.mlp.fc2"),
    "SwinTransformerBlock": ("attn.proj", "mlp.fc2"),
    "SwinTransformerV2Block": ("norm1", "norm2"),
    "ConvNeXtBlock": ("mlp.fc2",),
    "MixerBlock": ("mlp_tokens.fc2", "mlp_channels.fc2"),
    "ResBlock": ("linear_tokens", "mlp_channels.fc2"),
    "SpatialGatingBlock": ("mlp_channels.fc2",),
}

Init = Literal["fresh", "boundary", "grow"]


def extract(state_dict: Mapping[str, Tensor], partition: Partition, module: int) -> dict[str, Tensor]:
    """The tensors of one module, under the names of the model they come from (shared, not copied)."""
    return {name: tensor for name, tensor in state_dict.items() if partition.owner(name) == module}


def rename_tensors(tensors: Mapping[str, Tensor], source: Partition, target: Partition) -> dict[str, Tensor]:
    """The same tensors under the names that they have in a model of other depths.

    Raises:
        ArtifactError: a tensor has no place in one of the two models.
    """
    return {target.to_global_name(*source.to_local_name(name)): tensor for name, tensor in tensors.items()}


def insert(
    model: nn.Module, partition: Partition, module_tensors: Mapping[str, Tensor], from_partition: Partition
) -> None:
    """Copy all tensors of one module (or of several) from a model of other depths into this one.

    Args:
        module_tensors: as `extract` gives them, under the names of the model that ``from_partition`` describes.

    Raises:
        ArtifactError: tensors are missing, not expected or of another shape; the line names them. Nothing is copied.
    """
    modules = {from_partition.owner(name) for name in module_tensors}
    if not modules:
        raise ArtifactError("a module without tensors cannot be inserted")
    own = model.state_dict()
    expected = {name: tensor for name, tensor in own.items() if partition.owner(name) in modules}
    _copy(rename_tensors(module_tensors, from_partition, partition), expected)


def fit_positions(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same tensors for a model that looks at larger or smaller images: learned position embeddings resampled to its
    grid (timm's bicubic way, which leaves class and register tokens as they are), everything else as it was."""
    fitted, own = dict(tensors), model.state_dict()
    before, after = fitted.get("pos_embed"), own.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        grid = cast("list[int]", list(model.patch_embed.grid_size))  # type: ignore[union-attr, arg-type]
        fitted["pos_embed"] = resample_abs_pos_embed(
            before, new_size=grid, num_prefix_tokens=after.shape[1] - math.prod(grid)
        )
    return fitted


def assemble(parts: list[dict[str, Tensor]], expected: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The state dict of the target from its modules, each under the target's names.

    Args:
        expected: the names that the target has, ``model.state_dict()``; without it only overlaps are seen.

    Raises:
        ArtifactError: two modules hold the same tensor, or one is missing or not expected.
    """
    whole: dict[str, Tensor] = {}
    for module, part in enumerate(parts):
        if overlap := sorted(whole.keys() & part.keys()):
            raise ArtifactError(f"module {module} holds tensors of an earlier module: {_some(overlap)}")
        whole |= part
    if expected is not None:
        _same_names(whole, expected)
    return whole


def initialize(
    model: nn.Module,
    hybrid_partition: Partition,
    module: int,
    meta_state: Mapping[str, Tensor],
    meta_partition: Partition,
    init: Init,
) -> None:
    """What the module that trains starts from, in a hybrid with freshly drawn weights.

    ``"fresh"`` leaves it as it was drawn (the paper's). ``"boundary"`` copies from the meta model what the module has
    outside its blocks: stem, down-sampling, final norm, head. ``"grow"`` copies the meta module's blocks as well, to
    the first places in each stage, and makes the module's other blocks the identity: with the frozen modules inserted,
    the hybrid computes what the meta model computes.

    Args:
        model: the hybrid.
        module: the module that trains.
        meta_state: the meta model's state dict.

    Raises:
        ArtifactError: the meta model's tensors do not fit, by name.
        ConfigError: ``"grow"`` does not know how to make a block of this class the identity.
    """
    if init == "fresh":
        return
    meta_depths = meta_partition.depths[module] if init == "grow" else (0,) * meta_partition.family.stages

    def kept(name: str, partition: Partition) -> bool:
        block = partition.block_of(name)
        return block is None or block.index_in_module < meta_depths[block.stage]

    source = {n: t for n, t in extract(meta_state, meta_partition, module).items() if kept(n, meta_partition)}
    own = extract(model.state_dict(), hybrid_partition, module)
    own = {name: tensor for name, tensor in own.items() if kept(name, hybrid_partition)}
    outputs = [
        output
        for block in hybrid_partition.blocks()
        if init == "grow" and block.module == module and block.index_in_module >= meta_depths[block.stage]
        for output in _residual_outputs(model.get_submodule(block.path))
    ]
    _copy(rename_tensors(source, meta_partition, hybrid_partition), own)
    for output in outputs:
        for parameter in output.parameters():
            nn.init.zeros_(parameter)


def freeze_other_modules(model: nn.Module, partition: Partition, module: int | None) -> None:
    """Let one module train and nothing else; None: everything trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module is None or partition.owner(name) == module)


def _residual_outputs(block: nn.Module) -> list[nn.Module]:
    kind = type(block).__name__
    if kind not in RESIDUAL_OUTPUTS:
        raise ConfigError(
            f"incubate.init = 'grow' does not know a {kind} (it knows {', '.join(RESIDUAL_OUTPUTS)}): "
            "choose 'boundary' or 'fresh'"
        )
    outputs = []
    for pattern in RESIDUAL_OUTPUTS[kind]:
        found = [child for path, child in block.named_modules() if fnmatchcase(path, pattern)]
        assert found, f"timm's {kind} has no {pattern}"
        outputs += found
    return outputs


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    _same_names(source, destination)
    for name, tensor in source.items():
        if tensor.shape != destination[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model needs {tuple(destination[name].shape)}"
            raise ArtifactError(f"tensor {name!r} has the shape {shapes}")
    for name, tensor in source.items():
        destination[name].copy_(tensor)


def _same_names(given: Iterable[str], expected: Iterable[str]) -> None:
    given, expected = set(given), set(expected)
    if missing := sorted(expected - given):
        raise ArtifactError(f"tensors are missing: {_some(missing)}")
    if unexpected := sorted(given - expected):
        raise ArtifactError(f"tensors that the model does not have: {_some(unexpected)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
