"""Refuse models whose modules cannot be trained separately."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from .partition import Partition


def check_model(model: nn.Module, partition: Partition) -> None:
    """Check that no two modules share a tensor and that blocks of a stage are alike (up to the family's parity).

    Raises:
        ConfigError: Tied weights across modules, or blocks that differ by their index; the line names them.
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
    alike: dict[tuple[int, int], tuple[str, object]] = {}
    for block in partition.blocks():
        module = model.get_submodule(block.path)
        form = repr(module), [(name, parameter.shape) for name, parameter in module.named_parameters()]
        place = block.stage, block.index_in_stage % partition.family.parity
        path, expected = alike.setdefault(place, (block.path, form))
        if form != expected:
            raise ConfigError(
                f"blocks {path} and {block.path} differ: what a block is depends on its index, which changes with the"
                " depths of modules in front of it"
            )
