"""fairscale: weights are on every rank, gradients and optimizer state only on the rank that owns the parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compat.fairscale import import_fairscale, owner_rank
from ..storage.sharded_tensors import TensorShard, full_tensor
from .base import Sharding, update_weights_unless


class OptimizerStateSharding(Sharding):
    """fairscale's OSS with ShardedDataParallel: like ZeRO stage 2, but whole parameters are assigned to ranks."""

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Create the sharded optimizer and wrap the model.

        Raises:
            MissingDependencyError: fairscale is not installed.
        """
        OSS, ShardedDataParallel = import_fairscale()
        self.model = model
        base = make_optimizer(model)
        accepted = inspect.signature(type(base)).parameters
        defaults = {key: value for key, value in base.defaults.items() if key in accepted}
        self.optimizer = self.oss = OSS(base.param_groups, optim=type(base), **defaults)
        self.owned = {name: p for name, p in self.trainable.items() if owner_rank(self.oss, p) == self.env.rank}
        self.wrapped = ShardedDataParallel(model, self.oss)
        # move the parameters to new storage now: the first forward would do it after a moving average has stored
        # references to the old storage
        self.wrapped.refresh_trainable()
        return self.wrapped

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context that reduces gradients only in the last micro-batch."""
        return nullcontext() if last else self.wrapped.no_sync()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip gradients, update weights and clear gradients. Each rank updates its parameters and broadcasts them."""
        # only the owner has the reduced gradient of a parameter, so squared norms are summed over the ranks
        grads = [p.grad for p in self.owned.values() if p.grad is not None]
        square = torch.zeros((), device=self.env.device, dtype=torch.float32)
        if grads:
            square += torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) ** 2
        norm = self.env.sum_over_ranks(square).sqrt()
        if self.pre_step_hook:
            self.pre_step_hook(norm)
        skip = ~torch.isfinite(norm)
        if max_norm:  # has no effect if the update is skipped
            torch.nn.utils.clip_grads_with_norm_(list(self.owned.values()), max_norm, norm, foreach=True)
        update_weights_unless(skip, self.optimizer, self.inner_optimizer)
        # fairscale keeps references to the gradients, so they are zeroed in place
        self.optimizer.zero_grad(set_to_none=False)
        return norm, skip

    def updated_tensors(self) -> Mapping[str, Tensor]:
        """Return the parameters that this rank owns."""
        return self.owned

    def local_shards(self) -> dict[str, TensorShard]:
        """Return all trainable parameters, which are not sharded."""
        return {name: full_tensor(parameter) for name, parameter in self.trainable.items()}

    @property
    def inner_optimizer(self) -> Optimizer:
        """Return the optimizer of this rank's parameters."""
        inner: Optimizer = self.oss.optim
        return inner
