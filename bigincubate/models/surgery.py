"""Move the tensors of modules between models of different depths, and initialize new modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConfigError
from .partition import BlockRef, Partition

Init = Literal["fresh", "boundary", "grow", "stack", "g_stack"]
Boundary = Literal["own", "meta"]


def extract(state_dict: Mapping[str, Tensor], partition: Partition, *modules: int) -> dict[str, Tensor]:
    """Return the tensors of one or more modules under their names in this model; storage is shared, not copied."""
    chosen = set(modules)
    return {name: tensor for name, tensor in state_dict.items() if partition.owner(name) in chosen}


def rename_tensors(tensors: Mapping[str, Tensor], source: Partition, target: Partition) -> dict[str, Tensor]:
    """Return the same tensors under their names in a model of other depths.

    Raises:
        ArtifactError: One of the two models does not have one of the tensors.
    """
    return {target.to_global_name(*source.to_local_name(name)): tensor for name, tensor in tensors.items()}


def insert(
    model: nn.Module, partition: Partition, module_tensors: Mapping[str, Tensor], from_partition: Partition
) -> None:
    """Copy all tensors of one or more modules from a model of other depths into this model.

    Args:
        model: The model to copy into.
        partition: Its partition.
        module_tensors: The tensors under their names in the source model, as returned by `extract`.
        from_partition: The partition of the source model.

    Raises:
        ArtifactError: Tensors are missing, unexpected or of another shape; the message names them. Nothing is copied.
    """
    modules = {from_partition.owner(name) for name in module_tensors}
    if not modules:
        raise ArtifactError("no tensors to insert: the module is empty")
    own = model.state_dict()
    expected = {name: tensor for name, tensor in own.items() if partition.owner(name) in modules}
    _copy(rename_tensors(module_tensors, from_partition, partition), expected)


def assemble(parts: Sequence[Mapping[str, Tensor]], expected: Iterable[str] | nn.Module) -> dict[str, Tensor]:
    """Combine the tensors of all modules into the state dict of the target.

    Args:
        parts: The tensors of each module, under their names in the target.
        expected: The target; or the names of its tensors, or its state dict to check shapes too.

    Returns:
        The tensors of all modules by name.

    Raises:
        ArtifactError: Two modules have the same tensor, or a tensor is missing, unexpected, or of another
            shape.
        ConfigError: ``parts`` is not a list of dictionaries of tensors.

    Example:
        >>> modules = [bi.extract_module(hybrid) for hybrid in hybrids]
        >>> target.load_state_dict(bi.assemble(modules, target))
    """
    if isinstance(parts, Mapping | nn.Module | str):
        raise ConfigError(f"assemble takes a list with the tensors of each module, not a {type(parts).__name__}")
    assembled: dict[str, Tensor] = {}
    for module, part in enumerate(parts):
        if not isinstance(part, Mapping) or not all(isinstance(tensor, Tensor) for tensor in part.values()):
            raise ConfigError(f"module {module} is a {type(part).__name__}; pass what extract_module returns")
        if overlap := sorted(assembled.keys() & part.keys()):
            raise ArtifactError(f"module {module} has tensors of an earlier module: {_first_names(overlap)}")
        assembled.update(part)
    names = expected.state_dict() if isinstance(expected, nn.Module) else expected
    _check_names(assembled, names)
    for name, tensor in names.items() if isinstance(names, Mapping) else ():
        if assembled[name].shape != tensor.shape:
            shapes = f"{tuple(assembled[name].shape)}, but the target needs {tuple(tensor.shape)}"
            raise ArtifactError(f"tensor {name!r} has shape {shapes}")
    return assembled


def initialize(
    model: nn.Module,
    partition: Partition,
    modules: Collection[int],
    meta_state: Mapping[str, Tensor],
    meta_partition: Partition,
    init: Init,
) -> None:
    """Initialize modules of a hybrid or of the target, which have new random weights.

    ``"fresh"`` keeps the random weights (as in the paper). ``"boundary"`` copies the layers outside of blocks (stem,
    down-sampling, final norm, head) from the meta model. The following values also copy blocks:

    - ``"grow"`` copies the meta module's blocks to the module's first blocks in each stage and makes its other blocks
      the identity: if all other modules are the meta model's, or grown too, the model computes the same function as the
      meta model.
    - ``"stack"`` copies each of the meta module's blocks several times in a row: blocks 0, 1 become 0, 0, 1, 1.
    - ``"g_stack"`` repeats all blocks of a stage of the meta model in order, across modules (blocks 0, 1 become
      0, 1, 0, 1), as in G_stack (arXiv 2405.15319). It depends on the position of a module in the target.

    Args:
        model: The hybrid or the target.
        partition: Its partition.
        modules: The modules.
        meta_state: The meta model's state dict.
        meta_partition: The meta model's partition.
        init: How to initialize the modules.

    Raises:
        ArtifactError: The meta model's tensors do not fit; the message names them.
        ConfigError: ``"grow"`` cannot make a block of this class the identity.
    """
    if init == "fresh":
        return
    chosen = set(modules)
    copied = _find_sources(partition, chosen, meta_partition, init)
    outputs = [
        output
        for block in partition.blocks()
        if init == "grow" and block.module in chosen and block.path not in copied
        for output in partition.family.residual_outputs(model.get_submodule(block.path))
    ]
    own = extract(model.state_dict(), partition, *chosen)
    own = {name: own[name] for name in own if (of := partition.block_of(name)) is None or of.path in copied}
    tensors: dict[str, Tensor] = {}
    of_block: dict[str, dict[str, Tensor]] = {}
    for name, tensor in meta_state.items():
        if (of := meta_partition.block_of(name)) is not None:
            of_block.setdefault(of.path, {})[name.removeprefix(of.path)] = tensor
        elif meta_partition.owner(name) in chosen:
            tensors[name] = tensor
    for path, source in copied.items():
        tensors |= {path + rest: tensor for rest, tensor in of_block.get(source, {}).items()}
    _copy(tensors, own)
    for output in outputs:
        for parameter in output.parameters():
            nn.init.zeros_(parameter)


def find_copied_tensors(
    names: Iterable[str], partition: Partition, modules: Collection[int], meta_partition: Partition, init: Init
) -> dict[str, str]:
    """Return which tensors `initialize` copies: their names in the meta model by their names in the model.

    Args:
        names: Names of tensors of the model.
        partition: Its partition.
        modules: The modules that are initialized.
        meta_partition: The meta model's partition.
        init: How they are initialized.
    """
    if init == "fresh":
        return {}
    chosen = set(modules)
    sources = _find_sources(partition, chosen, meta_partition, init)
    copied: dict[str, str] = {}
    for name in names:
        block = partition.block_of(name)
        if block is None and partition.owner(name) in chosen:
            copied[name] = name
        elif block is not None and block.path in sources:
            copied[name] = sources[block.path] + name.removeprefix(block.path)
    return copied


def _find_sources(partition: Partition, modules: set[int], meta_partition: Partition, init: Init) -> dict[str, str]:
    """Return the paths of the blocks of the meta model by the paths of their copies in these modules."""
    blocks = (block for block in partition.blocks() if block.module in modules)
    found = ((block.path, _find_source(block, init, partition, meta_partition)) for block in blocks)
    return {path: source for path, source in found if source is not None}


def _find_source(block: BlockRef, init: Init, partition: Partition, meta_partition: Partition) -> str | None:
    """Return the path of the block of the meta model that a block is a copy of, or None if it is not a copy."""
    depth, meta_depth = (each.depths[block.module][block.stage] for each in (partition, meta_partition))
    if init == "grow" and block.index_in_module < meta_depth:
        return meta_partition.block_path(block.module, block.stage, block.index_in_module)
    if init == "stack":
        step = partition.family.parity  # what blocks compute depends on their index modulo this number
        groups, meta_groups = -(-depth // step), -(-meta_depth // step)
        group, rest = divmod(block.index_in_module, step)
        index = min(group * meta_groups // groups * step + rest, meta_depth - 1)
        return meta_partition.block_path(block.module, block.stage, index)
    if init == "g_stack":
        index = block.index_in_stage % meta_partition.stage_depths[block.stage]
        return meta_partition.family.block_path(block.stage, index)
    return None


def freeze_other_modules(
    model: nn.Module, partition: Partition, module: int | None, boundary: Boundary = "own"
) -> None:
    """Make only the parameters of one module trainable, or all parameters if ``module`` is None.

    Args:
        model: The model.
        partition: Its partition.
        module: The module.
        boundary: ``"own"``: the stem and the tail are parts of the first and the last module. ``"meta"``: they are
            those of the meta model, and frozen too.
    """
    for name, parameter in model.named_parameters():
        frozen = boundary == "meta" and partition.is_boundary(name)
        parameter.requires_grad_(module is None or (partition.owner(name) == module and not frozen))


def insert_boundary(
    model: nn.Module, partition: Partition, meta_state: Mapping[str, Tensor], meta_partition: Partition
) -> None:
    """Copy the stem and the tail of the meta model into a hybrid.

    Raises:
        ArtifactError: The meta model's tensors do not fit; the message names them.
    """
    tensors = {name: tensor for name, tensor in meta_state.items() if meta_partition.is_boundary(name)}
    _copy(tensors, {name: tensor for name, tensor in model.state_dict().items() if partition.is_boundary(name)})


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    _check_names(source, destination)
    for name, tensor in source.items():
        if tensor.shape != destination[name].shape:
            shapes = f"{tuple(tensor.shape)}, but the model needs {tuple(destination[name].shape)}"
            raise ArtifactError(f"tensor {name!r} has the shape {shapes}")
    for name, tensor in source.items():
        destination[name].copy_(tensor)


def _check_names(given: Iterable[str], expected: Iterable[str]) -> None:
    given, expected = set(given), set(expected)
    if missing := sorted(expected - given):
        raise ArtifactError(f"tensors are missing: {_first_names(missing)}")
    if unexpected := sorted(given - expected):
        raise ArtifactError(f"tensors that the model does not have: {_first_names(unexpected)}")


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
