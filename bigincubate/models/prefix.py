"""A hybrid cut before the module that trains: what reaches that module, and the rest as a model that begins there.

Everything before it is frozen. Where it is deterministic besides, the same image always gives the same features.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import torch
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import ConfigError
from .drop_path import DropPath, drop_paths
from .partition import Partition


def begin_at(model: nn.Module, partition: Partition, module: int) -> None:
    """Make a model begin at a module: it takes what reaches that module (:func:`reaching`) in place of images, and what
    came before is gone. Names of the other parameters stay as they are."""
    for path, owner in list(_parts(model, partition)):
        if owner < module:
            model.set_submodule(path, Passed(model.get_submodule(path)))
    for name in partition.family.embed:
        setattr(model, name, _same)
    for name, _ in list(model.named_parameters(recurse=False)):  # such as the class token
        if partition.owner(name) < module:
            setattr(model, name, None)


class Passed(nn.Module):
    """In the place of a part that is gone. What stochastic depth had there is kept, for its place in the masks."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.drop_paths = nn.ModuleList(drop_paths(part))

    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def reaching(model: nn.Module, partition: Partition, module: int, images: Tensor) -> Tensor:
    """What reaches a module of a whole model: a tensor whose first dimension is that of ``images``. Nothing behind it
    is computed. Its shape is the family's: tokens, or a map with channels first or last."""
    path = next(path for path, owner in _parts(model, partition) if owner == module)
    part = model.get_submodule(path)
    model.set_submodule(path, _Stop())
    try:
        model(images)
    except _Reached as reached:
        return reached.features
    finally:
        model.set_submodule(path, part)
    raise AssertionError(f"{path} was not reached")


def check_deterministic(model: nn.Module, partition: Partition, module: int) -> None:
    """
    Raises:
        ConfigError: something random lies before the module.
    """
    before = [model.get_submodule(path) for path, owner in _parts(model, partition) if owner < module]
    blocks = partition.block_path(0, 0, 0).partition(".")[0]
    ahead = list(takewhile(lambda child: child[0] != blocks, model.named_children()))
    beside = [child for _, child in ahead if not list(child.parameters())]  # dropout of positions or patches
    for part in (part for whole in (*before, *beside) for part in whole.modules()):
        if _probability(part) > 0:
            raise ConfigError(
                f"incubate.prefix_cache: {type(part).__name__} before module {module} drops at random, so what reaches"
                " it is new in every step: set its rate in model.args to 0, or incubate.prefix_cache = false"
            )


def _probability(part: nn.Module) -> float:
    match part:
        case _DropoutNd():
            return part.p
        case PatchDropout():
            return float(part.prob)
        case DropPath():
            return part.rate
    return 0.0


class _Stop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise _Reached(x)


class _Reached(Exception):
    def __init__(self, features: Tensor) -> None:
        self.features = features


def _same(x: Tensor) -> Tensor:
    return x


def _parts(model: nn.Module, partition: Partition) -> Iterator[tuple[str, int]]:
    """Paths of blocks and of what lies around them and has parameters, in the order of execution; and whose each is."""
    blocks = {block.path for block in partition.blocks()}

    def below(parent: nn.Module, path: str) -> Iterator[tuple[str, int]]:
        for name, child in parent.named_children():
            at = f"{path}{name}"
            if at not in blocks and any(block.startswith(f"{at}.") for block in blocks):
                yield from below(child, f"{at}.")
            elif (parameter := next(child.named_parameters(), None)) is not None:
                yield at, partition.owner(f"{at}.{parameter[0]}")

    yield from below(model, "")
