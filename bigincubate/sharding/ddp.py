"""Training with all state on every rank: one process, or DDP on several ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..distributed.process_group import DistributedContext
from .base import Sharding, clip_gradients, update_weights_unless


class Replicated(Sharding):
    """Every rank has all weights, gradients and optimizer state.

    Args:
        env: The process group.
        micro_batches: Micro-batches per step on each rank.
    """

    def __init__(self, env: DistributedContext, micro_batches: int = 1) -> None:
        super().__init__(env)
        self.micro_batches = micro_batches
        self.ddp: DistributedDataParallel | None = None

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Create the optimizer and wrap the model in DDP, which reduces gradients of trainable parameters only."""
        self.model = model
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
                static_graph=self.micro_batches == 1,  # a static graph does not allow no_sync in the first backward
            )
        return self.ddp

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context that reduces gradients only in the last micro-batch."""
        return self.ddp.no_sync() if self.ddp and not last else nullcontext()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip gradients, update weights and clear gradients."""
        norm = clip_gradients(self.trainable.values(), max_norm)
        if self.pre_step_hook:
            self.pre_step_hook(norm)
        skip = ~torch.isfinite(norm)
        update_weights_unless(skip, self.optimizer)
        # DDP's gradients are views of its buckets: zero them in place to keep the views
        self.optimizer.zero_grad(set_to_none=self.ddp is None)
        return norm, skip

    def saved_tensors(self) -> Mapping[str, Tensor]:
        """Return all parameters on rank 0."""
        return self.trainable if self.env.is_main else {}
