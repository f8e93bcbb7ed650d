"""Move the tensors of modules between models of different depths, and initialize new modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from .partition import Partition

Init = Literal["fresh", "boundary", "grow"]


def extract(state_dict: Mapping[str, Tensor], partition: Partition, module: int) -> dict[str, Tensor]:
    """Return the tensors of one module, under the names of the model that they come from (shared, not copied)."""
    return {name: tensor for name, tensor in state_dict.items() if partition.owner(name) == module}


def rename_tensors(tensors: Mapping[str, Tensor], source: Partition, target: Partition) -> dict[str, Tensor]:
    """Return the same tensors under the names that they have in a model of other depths.

    Raises:
        ArtifactError: One of the two models has no such tensor.
    """
    return {target.to_global_name(*source.to_local_name(name)): tensor for name, tensor in tensors.items()}


def insert(
    model: nn.Module, partition: Partition, module_tensors: Mapping[str, Tensor], from_partition: Partition
) -> None:
    """Copy all tensors of one module (or of several) from a model of other depths into this one.

    Args:
        model: The model to copy into.
        partition: Its partition.
        module_tensors: The tensors as `extract` returns them, under the names of the model they come from.
        from_partition: The partition of the model that they come from.

    Raises:
        ArtifactError: Tensors are missing, not expected or of another shape; the line names them. Nothing is copied.
    """
    modules = {from_partition.owner(name) for name in module_tensors}
    if not modules:
        raise ArtifactError("a module without tensors cannot be inserted")
    own = model.state_dict()
    expected = {name: tensor for name, tensor in own.items() if partition.owner(name) in modules}
    _copy(rename_tensors(module_tensors, from_partition, partition), expected)


def assemble(parts: list[dict[str, Tensor]], expected: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Join modules, each under the target's names, to the state dict of the target.

    Args:
        parts: The tensors of each module.
        expected: The names that the target has, such as ``model.state_dict()``; without it only overlaps are found.

    Returns:
        The tensors of all modules by name.

    Raises:
        ArtifactError: Two modules hold the same tensor, or a tensor is missing or not expected.

    Example:
        >>> target.load_state_dict(bi.assemble([bi.extract_module(hybrid) for hybrid in hybrids]))
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
    """Initialize the module that trains, in a hybrid with freshly drawn weights.

    ``"fresh"`` leaves it as it was drawn (as in the paper). ``"boundary"`` copies from the meta model what the module
    has outside its blocks: stem, down-sampling, final norm, head. ``"grow"`` also copies the meta module's blocks to
    the first places in each stage, and makes the module's other blocks the identity: with the frozen modules inserted,
    the hybrid computes what the meta model computes.

    Args:
        model: The hybrid.
        hybrid_partition: Its partition.
        module: The module that trains.
        meta_state: The meta model's state dict.
        meta_partition: Its partition.
        init: How to initialize the module.

    Raises:
        ArtifactError: The meta model's tensors do not fit; the line names them.
        ConfigError: ``"grow"`` cannot make a block of this class the identity.
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
        for output in hybrid_partition.family.residual_outputs(model.get_submodule(block.path))
    ]
    _copy(rename_tensors(source, meta_partition, hybrid_partition), own)
    for output in outputs:
        for parameter in output.parameters():
            nn.init.zeros_(parameter)


def freeze_other_modules(model: nn.Module, partition: Partition, module: int | None) -> None:
    """Make only the parameters of one module trainable (None: all parameters)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module is None or partition.owner(name) == module)


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
