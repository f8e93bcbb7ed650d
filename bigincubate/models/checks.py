"""Reject models whose modules cannot be trained separately."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from .partition import Partition


def check_model(model: nn.Module, partition: Partition) -> None:
    """Check that modules share no tensors, and that the blocks of a stage do not depend on their index.

    Blocks may depend on their index modulo the family's parity.

    Raises:
        ConfigError: Two modules have tied weights, or two blocks differ; the message names them.
    """
    seen: dict[int, tuple[str, int]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = partition.owner(name)
        first, other = seen.setdefault(tensor.untyped_storage()._cdata, (name, owner))
        if other != owner:
            raise ConfigError(
                f"{first} (module {other}) and {name} (module {owner}) share one tensor (tied weights), but modules are"
                " trained separately: untie them in model.args"
            )
    structures: dict[tuple[int, int], tuple[str, object]] = {}
    for block in partition.blocks():
        module = model.get_submodule(block.path)
        structure = repr(module), [(name, parameter.shape) for name, parameter in module.named_parameters()]
        position = block.stage, block.index_in_stage % partition.family.parity
        path, expected = structures.setdefault(position, (block.path, structure))
        if structure != expected:
            raise ConfigError(
                f"blocks {path} and {block.path} differ: the structure of a block must not depend on its index, which"
                " changes with the depths of earlier modules; choose another model.name or model.args"
            )
