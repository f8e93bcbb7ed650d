"""FSDP2: each rank holds rows of every trainable tensor, of its gradient and of its optimizer state.

Blocks with trainable parameters are units of their own. Frozen parameters stay whole on every rank, unless they are to
be cut too (``shard_frozen``): then they are gathered in every forward, for nothing that training changes.

With ``replicas`` the ranks form a mesh, replicate x shard: rows are cut within a replica, and gradients are averaged
over the replicas besides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..checkpoint.pieces import Piece, PieceReader
from ..cluster.env import RunEnv
from ..config import Fsdp2
from ..errors import ConfigError
from .gradients import clip_gradients
from .state import load_optimizer, save_optimizer


class FullyShard:
    """``fully_shard``, a block at a time.

    In bf16 autocast does what it does elsewhere, to weights gathered in fp32. With ``gather_bf16`` they are gathered as
    bf16, at half the bytes, gradients still reduced in fp32; then what enters a block is bf16 too, and norms compute in
    it. What a rank holds and updates is fp32 in any case.
    """

    optimizer: Optimizer
    gathers = True

    def __init__(self, env: RunEnv, choices: Fsdp2, precision: str) -> None:
        """
        Raises:
            ConfigError: the ranks cannot be divided into the replicas.
        """
        self.env, self.choices = env, choices
        if env.world % choices.replicas:
            raise ConfigError(f"sharding.fsdp2.replicas = {choices.replicas} does not divide {env.world} ranks")
        self.policy = MixedPrecisionPolicy()
        if choices.gather_bf16 and precision == "bf16":
            self.policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        shape = (self.choices.replicas, self.env.world // self.choices.replicas)
        mesh = init_device_mesh(self.env.device.type, shape, mesh_dim_names=("replicate", "shard"))
        self.first_replica = mesh.get_local_rank("replicate") == 0
        options: dict[str, Any] = {
            "mesh": mesh if shape[0] > 1 else mesh["shard"],
            "reshard_after_forward": self.choices.reshard_after_forward,
            "mp_policy": self.policy,
        }
        if self.choices.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.env.device.type == "cuda")
        cut = {parameter for parameter in model.parameters() if parameter.requires_grad or self.choices.shard_frozen}
        candidates = [model.get_submodule(path) for path in units]
        blocks = [fully_shard(block, **options) for block in candidates if not cut.isdisjoint(block.parameters())]
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
        wrapped = fully_shard(model, **options, ignored_params=set(model.parameters()) - cut)
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
        self.wrapped.set_reshard_after_forward(last and self.choices.reshard_after_forward)
        self.wrapped.set_reshard_after_backward(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        norm = clip_gradients(self.named.values(), max_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor().to(self.env.device)
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
        if not self.first_replica:
            return {}
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
    dim = mesh.ndim - 1  # before it, if anything: replicas
    start = min(mesh.get_local_rank(dim) * -(-height // mesh.size(dim)), height)
    return Piece(value.to_local().detach(), start * math.prod(parameter.shape[1:]), tuple(parameter.shape))
