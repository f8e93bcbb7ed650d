"""Optimizer state by parameter name: saved by one strategy, restored by any other.

Keys are ``model/NAME``, ``optim/STATE/NAME`` and ``group/step/INDEX`` (timm's LAMB counts steps per parameter group).
Some optimizers store Python numbers and would compute differently with tensors; these are saved as 64-bit tensors with
the prefix ``number/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..storage.sharded_tensors import TensorShard

NUMBER_PREFIX = "number/"

# (parameter, state tensor of the same shape) -> this rank's shard of the state tensor
ShardState = Callable[[Tensor, Tensor], Tensor | TensorShard]
# (parameter, key in the checkpoint) -> this rank's shard as the optimizer stores it
LoadShard = Callable[[Tensor, str], Tensor]


def save_optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], shard: ShardState, *, counters: bool = True
) -> dict[str, Tensor | TensorShard]:
    """Return the optimizer state on this rank for a checkpoint.

    Args:
        optimizer: the optimizer.
        parameters: its parameters by name.
        shard: returns this rank's shard of a state tensor that has the shape of its parameter.
        counters: whether to include values that are equal on all ranks, such as step counts.
    """
    tensors: dict[str, Tensor | TensorShard] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[f"optim/{key}/{name}"] = shard(parameter, value)
            elif counters:
                tensors |= pack_value(f"optim/{key}/{name}", value)
    for index, group in enumerate(optimizer.param_groups):
        if "step" in group and counters:
            tensors |= pack_value(f"group/step/{index}", group["step"])
    return tensors


def load_optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], load_shard: LoadShard
) -> None:
    """Restore the optimizer state of ``parameters`` and the step counts of the parameter groups.

    Args:
        optimizer: the optimizer, which may have no state yet.
        parameters: its parameters by name; keys of other parameters are ignored.
        tensors: the checkpoint.
        load_shard: reads this rank's shard of a state tensor that has the shape of its parameter.
    """
    fused = optimizer.defaults.get("fused")
    for path in tensors:
        kind, _, rest = path.removeprefix(NUMBER_PREFIX).partition("/")
        key, _, name = rest.partition("/")
        if kind == "optim" and name in parameters:
            parameter = parameters[name]
            if path.startswith(NUMBER_PREFIX):
                optimizer.state[parameter][key] = tensors[path].item()
            elif key == "step" or tensors[path].shape != parameter.shape:
                device = parameter.device if fused else torch.device("cpu")
                optimizer.state[parameter][key] = tensors[path].to(device, copy=True)
            else:
                optimizer.state[parameter][key] = load_shard(parameter, path)
        elif kind == "group":
            value = tensors[path]
            number = path.startswith(NUMBER_PREFIX)
            optimizer.param_groups[int(name)]["step"] = value.item() if number else value.clone()


def pack_value(path: str, value: Any) -> dict[str, Tensor]:
    """Return a small value under its key: a tensor as it is, a Python number as a 64-bit tensor."""
    if isinstance(value, Tensor):
        return {path: value.clone()}  # parameters may share a count; a safetensors file may not
    return {NUMBER_PREFIX + path: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)}
