"""What an optimizer keeps, by the names of the parameters: saved by one strategy, taken back by another.

Keys: ``model/NAME``, ``optim/STATE/NAME`` and, for what timm's LAMB counts by group, ``group/step/INDEX``. Some
optimizers keep numbers of Python, and would compute otherwise with tensors: a number travels as 64 bits, under
``number/…``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checkpoint.pieces import Piece

NUMBER = "number/"

Save = Callable[[Tensor, Tensor], Tensor | Piece]  # parameter, a tensor of its shape -> this rank's share
Load = Callable[[Tensor, str], Tensor]  # parameter, key -> this rank's share, where and as the optimizer keeps it


def save_optimizer(
    optimizer: Optimizer, named: Mapping[str, Tensor], share: Save, *, counters: bool = True
) -> dict[str, Tensor | Piece]:
    """The optimizer's state on this rank. ``share`` cuts what has the shape of its parameter; ``counters``: whether
    this rank writes what is the same on all (step counts)."""
    tensors: dict[str, Tensor | Piece] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[f"optim/{key}/{name}"] = share(parameter, value)
            elif counters:
                tensors |= packed(f"optim/{key}/{name}", value)
    for index, group in enumerate(optimizer.param_groups):
        if "step" in group and counters:
            tensors |= packed(f"group/step/{index}", group["step"])
    return tensors


def load_optimizer(
    optimizer: Optimizer, named: Mapping[str, Tensor], tensors: Mapping[str, Tensor], part: Load
) -> None:
    """Fill the state of ``optimizer`` for the parameters in ``named``, and the counts of its groups."""
    fused = optimizer.defaults.get("fused")
    for path in tensors:
        kind, _, rest = path.removeprefix(NUMBER).partition("/")
        key, _, name = rest.partition("/")
        if kind == "optim" and name in named:
            parameter = named[name]
            if path.startswith(NUMBER):
                optimizer.state[parameter][key] = tensors[path].item()
            elif key == "step" or tensors[path].shape != parameter.shape:
                device = parameter.device if fused else torch.device("cpu")
                optimizer.state[parameter][key] = tensors[path].to(device, copy=True)
            else:
                optimizer.state[parameter][key] = part(parameter, path)
        elif kind == "group":
            value = tensors[path]
            number = path.startswith(NUMBER)
            optimizer.param_groups[int(name)]["step"] = value.item() if number else value.clone()


def packed(path: str, value: Any) -> dict[str, Tensor]:
    """A count or another small value under its key: tensors as they are, numbers of Python as 64 bits."""
    if isinstance(value, Tensor):
        return {path: value.clone()}  # one count may stand for many parameters; in a file each has its own
    return {NUMBER + path: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)}
