"""FSDP2: each rank holds rows of every trainable tensor, of its gradient and of its optimizer state.

Blocks with trainable parameters are units of their own. Frozen parameters stay whole on every rank: to shard them would
mean to gather them in every forward, for nothing that training changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..checkpoint.pieces import Piece, PieceReader
from ..cluster.env import RunEnv
from ..errors import ConfigError
from .state import load_optimizer, save_optimizer


class FullyShard:
    """``fully_shard``, a block at a time, over all ranks."""

    optimizer: Optimizer
    gathers = True

    def __init__(self, env: RunEnv) -> None:
        self.env = env

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        mesh = init_device_mesh(self.env.device.type, (self.env.world,))
        frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        for path in units:
            block = model.get_submodule(path)
            if any(parameter.requires_grad for parameter in block.parameters()):
                fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh, ignored_params=frozen)
        assert isinstance(wrapped, FSDPModule)
        self.model, self.wrapped = model, wrapped
        self.named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = make_optimizer(model)
        return model

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.wrapped.set_requires_gradient_sync(last)
        self.wrapped.set_is_last_backward(last)
        # nothing changes between micro-batches: what is gathered stays until the last
        self.wrapped.set_reshard_after_forward(last)
        self.wrapped.set_reshard_after_backward(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        norm = torch.nn.utils.clip_grad_norm_(list(self.named.values()), max_norm or float("inf"), foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        skip = ~torch.isfinite(norm)
        if not bool(skip):  # the norm is the same on every rank: all step, or none
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, skip

    def before_update(self, call: Callable[[Tensor], None]) -> None:
        raise ConfigError(
            'optim.lr_scaling = "adascale" looks at whole gradients of each rank\'s own samples, which'
            ' sharding.strategy = "fsdp2" does not show; use "ddp" or "oss"'
        )

    def shards(self) -> dict[str, Piece]:
        return {name: _rows(parameter, parameter) for name, parameter in self.named.items()}

    def publish(self) -> None:
        """Nothing: the shards are what the model computes with."""

    def save(self) -> dict[str, Tensor | Piece]:
        tensors: dict[str, Tensor | Piece] = {f"model/{name}": piece for name, piece in self.shards().items()}
        return tensors | save_optimizer(self.optimizer, self.named, _rows, counters=self.env.is_main)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(tensors, PieceReader)

        def part(parameter: Tensor, key: str) -> Tensor:
            assert isinstance(parameter, DTensor)
            mine = _rows(parameter, parameter)
            flat = tensors.part(key, mine.offset, mine.tensor.numel()).to(mine.tensor.device)
            rows = flat.view(mine.tensor.shape).clone()
            mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
            return DTensor.from_local(rows, mesh, parameter.placements, shape=shape, stride=stride)

        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(part(parameter, f"model/{name}"))
        load_optimizer(self.optimizer, self.named, tensors, part)

    def full_state_dict(self) -> dict[str, Tensor]:
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
            for name, value in self.model.state_dict().items()
        }


def _rows(parameter: Tensor, value: Tensor) -> Piece:
    """This rank's rows of ``value``, which is spread as ``parameter`` is: fully_shard cuts the first dimension into
    chunks of one height, of which the last may be lower or empty."""
    assert isinstance(parameter, DTensor)
    assert isinstance(value, DTensor)
    mesh, height = parameter.device_mesh, parameter.shape[0]
    start = min(mesh.get_local_rank() * -(-height // mesh.size()), height)
    return Piece(value.to_local().detach(), start * math.prod(parameter.shape[1:]), tuple(parameter.shape))
