"""FSDP2: shard trainable weights, gradients and optimizer state over the ranks along dimension 0.

Each block with trainable parameters is a unit. Frozen parameters stay on every rank, unless ``shard_frozen`` is set;
then they are sharded too, and gathered in every forward.

With several ``replicas``, the ranks form a two-dimensional mesh (replicate, shard): tensors are sharded within a
replica, and gradients are also averaged over the replicas.
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

from ..config import Fsdp2Config
from ..distributed.process_group import DistributedContext
from ..errors import ConfigError
from ..storage.sharded_tensors import TensorShard
from .base import Sharding, clip_gradients, update_weights_unless


class FullyShard(Sharding):
    """torch's ``fully_shard``, applied to each block.

    Shards are fp32 and gradients are reduced in fp32. With bf16 precision, weights are gathered in fp32, and autocast
    is used as in other strategies. With ``gather_bf16``, weights are gathered in bf16, which halves the traffic; block
    inputs are then bf16 too, and normalization layers compute in bf16.

    Args:
        env: The process group.
        choices: The recipe's ``[sharding.fsdp2]`` table.
        precision: ``train.precision``.

    Raises:
        ConfigError: The number of ranks is not divisible by the number of replicas.
    """

    forward_is_collective = True

    def __init__(self, env: DistributedContext, choices: Fsdp2Config, precision: str) -> None:
        super().__init__(env)
        self.choices = choices
        if env.world % choices.replicas:
            raise ConfigError(f"sharding.fsdp2.replicas = {choices.replicas} does not divide {env.world} ranks")
        self.policy = MixedPrecisionPolicy()
        if choices.gather_bf16 and precision == "bf16":
            self.policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Shard the model in place, set up prefetching of the next block, and create the optimizer."""
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
        sharded = {
            parameter for parameter in model.parameters() if parameter.requires_grad or self.choices.shard_frozen
        }
        candidates = [model.get_submodule(path) for path in units]
        blocks = [fully_shard(block, **options) for block in candidates if not sharded.isdisjoint(block.parameters())]
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
        wrapped = fully_shard(model, **options, ignored_params=set(model.parameters()) - sharded)
        assert isinstance(wrapped, FSDPModule)
        self.model, self.wrapped = model, wrapped
        self.optimizer = make_optimizer(model)
        return model

    @contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """Reduce gradients and free gathered weights in the last micro-batch only."""
        self.wrapped.set_requires_gradient_sync(last)
        self.wrapped.set_is_last_backward(last)
        # weights do not change between micro-batches, so they stay gathered until the last one
        self.wrapped.set_reshard_after_forward(last and self.choices.reshard_after_forward)
        self.wrapped.set_reshard_after_backward(last)
        yield

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip gradients by the norm over all ranks, update this rank's shards and clear gradients."""
        norm = clip_gradients(self.trainable.values(), max_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        skip = ~torch.isfinite(norm)  # the norm and therefore the decision is the same on all ranks
        update_weights_unless(skip, self.optimizer)
        self.optimizer.zero_grad()
        return norm.to(self.env.device), skip.to(self.env.device)

    def register_pre_step_hook(self, hook: Callable[[Tensor], None]) -> None:
        """Raise ConfigError: gradients are reduced and sharded before the hook could read them."""
        raise ConfigError(
            "optim.lr_scaling: a learning-rate hook needs the full gradients of each rank before they are reduced,"
            ' which sharding.strategy = "fsdp2" does not provide; use "ddp" or "oss"'
        )

    def local_shard(self, name: str, value: Tensor) -> TensorShard:
        """Return this rank's shard of ``value``, which is sharded like parameter ``name``.

        ``fully_shard`` splits dimension 0 into equal chunks; the last ones may be smaller or empty.
        """
        assert isinstance(value, DTensor)
        mesh, rows = value.device_mesh, value.shape[0]
        dim = mesh.ndim - 1  # the last dimension shards; with replicas, the first one replicates
        start = min(mesh.get_local_rank(dim) * -(-rows // mesh.size(dim)), rows)
        return TensorShard(value.to_local().detach(), start * math.prod(value.shape[1:]), tuple(value.shape))

    def saved_tensors(self) -> Mapping[str, Tensor]:
        """Return all parameters on ranks of the first replica, and none on others."""
        return self.trainable if self.first_replica else {}

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers on the CPU. Collective: sharded tensors are gathered."""
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
            for name, value in self.model.state_dict().items()
        }
