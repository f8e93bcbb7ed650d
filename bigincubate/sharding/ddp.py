"""Replicated training: one process, or DDP on several ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..compat.torch import skip_fused_step_if
from ..distributed.process_group import DistributedContext
from ..storage.sharded_tensors import TensorShard, full_tensor
from .gradients import clip_gradients
from .state import load_optimizer_state, save_optimizer_state


class Replicated:
    """Every rank has all weights, gradients and optimizer state.

    Args:
        env: the process group.
        micro_batches: micro-batches per step on each rank.
    """

    optimizer: Optimizer
    forward_is_collective = False

    def __init__(self, env: DistributedContext, micro_batches: int = 1) -> None:
        self.env, self.micro_batches = env, micro_batches
        self.ddp: DistributedDataParallel | None = None
        self.pre_step_hook: Callable[[Tensor], None] | None = None

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Create the optimizer and wrap the model in DDP, which reduces gradients of trainable parameters only."""
        self.model = model
        self.trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = make_optimizer(model)
        if self.env.world == 1:
            return model
        ids = [self.env.device.index] if self.env.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers; torch 2.11 does not have the new name
            warnings.simplefilter("ignore", FutureWarning)
            self.ddp = DistributedDataParallel(
                model,
                device_ids=ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=self.micro_batches == 1,  # with a static graph the first backward cannot be in no_sync
            )
        return self.ddp

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context without communication except for the last micro-batch."""
        return self.ddp.no_sync() if self.ddp and not last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip, update and clear gradients. A fused optimizer does so without waiting for the device."""
        norm = clip_gradients(self.trainable.values(), max_norm)
        if self.pre_step_hook:
            self.pre_step_hook(norm)
        skip = ~torch.isfinite(norm)
        if self.optimizer.defaults.get("fused"):
            skip_fused_step_if(self.optimizer, skip)
            self.optimizer.step()
        elif not bool(skip):
            self.optimizer.step()
        # DDP's gradients are views of its buckets; zeroing in place keeps them
        self.optimizer.zero_grad(set_to_none=self.ddp is None)
        return norm, skip

    def register_pre_step_hook(self, hook: Callable[[Tensor], None]) -> None:
        """Call ``hook`` before every update."""
        self.pre_step_hook = hook

    def local_shards(self) -> dict[str, TensorShard]:
        """Return the trainable parameters, which are not sharded."""
        return {name: full_tensor(parameter) for name, parameter in self.trainable.items()}

    def sync_weights_from_master(self) -> None:
        """Do nothing: the model computes with the local shards."""

    def save(self) -> dict[str, Tensor | TensorShard]:
        """Return weights and optimizer state on rank 0."""
        if not self.env.is_main:
            return {}
        tensors: dict[str, Tensor | TensorShard] = {f"model/{name}": p.detach() for name, p in self.trainable.items()}
        return tensors | save_optimizer_state(self.optimizer, self.trainable, lambda _, value: value)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore weights and optimizer state."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"model/{name}"])
        load_optimizer_state(
            self.optimizer, self.trainable, tensors, lambda parameter, key: tensors[key].to(parameter.device, copy=True)
        )

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers on the CPU."""
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
