"""fairscale: weights on every rank, gradients and optimizer state only on the rank that owns the parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compat.fairscale import import_fairscale, owner_rank
from ..distributed.process_group import DistributedContext
from ..storage.sharded_tensors import TensorShard, full_tensor
from .state import load_optimizer_state, save_optimizer_state


class OptimizerStateSharding:
    """fairscale's OSS with ShardedDataParallel: ZeRO stage 2 at the granularity of parameters."""

    optimizer: Optimizer
    forward_is_collective = False

    def __init__(self, env: DistributedContext) -> None:
        self.env = env
        self.pre_step_hook: Callable[[Tensor], None] | None = None

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Create the sharded optimizer and wrap the model.

        Raises:
            MissingDependencyError: fairscale is not installed.
        """
        OSS, ShardedDataParallel = import_fairscale()
        self.model = model
        self.trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        base = make_optimizer(model)
        accepted = inspect.signature(type(base)).parameters
        defaults = {key: value for key, value in base.defaults.items() if key in accepted}
        self.optimizer = self.oss = OSS(base.param_groups, optim=type(base), **defaults)
        self.owned = {name: p for name, p in self.trainable.items() if owner_rank(self.oss, p) == self.env.rank}
        self.wrapped = ShardedDataParallel(model, self.oss)
        # moves the parameters into new storage now; otherwise the first forward would, and a moving average would keep
        # references to the old storage
        self.wrapped.refresh_trainable()
        return self.wrapped

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context without communication except for the last micro-batch."""
        return nullcontext() if last else self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip, update and clear gradients. Each rank updates the parameters it owns, then sends them to all ranks."""
        # only the owner has the reduced gradient of a parameter; squared norms of the owners add up
        grads = [p.grad for p in self.owned.values() if p.grad is not None]
        square = torch.zeros((), device=self.env.device, dtype=torch.float32)
        if grads:
            square += torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) ** 2
        norm = self.env.sum_over_ranks(square).sqrt()
        if self.pre_step_hook:
            self.pre_step_hook(norm)
        skip = ~torch.isfinite(norm)
        if not bool(skip):
            if max_norm:
                torch.nn.utils.clip_grads_with_norm_(list(self.owned.values()), max_norm, norm, foreach=True)
            self.optimizer.step()
        # fairscale keeps references to the gradients, so they are zeroed in place
        self.optimizer.zero_grad(set_to_none=False)
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
        """Return weights and optimizer state of the parameters that this rank owns."""
        tensors: dict[str, Tensor | TensorShard] = {f"model/{name}": p.detach() for name, p in self.owned.items()}
        state = save_optimizer_state(self.oss.optim, self.owned, lambda _, value: value)
        return tensors | {key: value for key, value in state.items() if "group/" not in key or self.env.is_main}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore all weights, and optimizer state of the parameters that this rank owns."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"model/{name}"])
        load_optimizer_state(
            self.oss.optim, self.owned, tensors, lambda parameter, key: tensors[key].to(parameter.device, copy=True)
        )

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers on the CPU."""
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
