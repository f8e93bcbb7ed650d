"""fairscale: every rank holds the weights; gradients and optimizer state live on the rank that owns the parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint.pieces import Piece, whole
from ..cluster.env import RunEnv
from ..compat.fairscale import import_fairscale, owner_rank
from .state import load_optimizer, save_optimizer


class OptimizerStateSharding:
    """fairscale's OSS with ShardedDataParallel (ZeRO stage 2 by whole parameters)."""

    optimizer: Optimizer
    gathers = False

    def __init__(self, env: RunEnv) -> None:
        self.env = env
        self.ahead: Callable[[Tensor], None] | None = None

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        OSS, ShardedDataParallel = import_fairscale()
        self.model = model
        self.named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        plain = make_optimizer(model)
        taken = inspect.signature(type(plain)).parameters
        defaults = {key: value for key, value in plain.defaults.items() if key in taken}
        self.optimizer = self.oss = OSS(plain.param_groups, optim=type(plain), **defaults)
        self.mine = {name: p for name, p in self.named.items() if owner_rank(self.oss, p) == self.env.rank}
        self.wrapped = ShardedDataParallel(model, self.oss)
        # it moves the parameters into new buffers, which else would be in the first forward: after an average was made
        # of the tensors that they were in before
        self.wrapped.refresh_trainable()
        return self.wrapped

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        # a gradient is whole on its owner alone: the squares of the owners' norms add up
        grads = [p.grad for p in self.mine.values() if p.grad is not None]
        square = torch.zeros((), device=self.env.device, dtype=torch.float32)
        if grads:
            square += torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) ** 2
        norm = self.env.sum(square).sqrt()
        if self.ahead:
            self.ahead(norm)
        skip = ~torch.isfinite(norm)
        if not bool(skip):
            if max_norm:
                torch.nn.utils.clip_grads_with_norm_(list(self.mine.values()), max_norm, norm, foreach=True)
            self.optimizer.step()
        # fairscale reduces into the gradients it knows: zeroed in place, never dropped
        self.optimizer.zero_grad(set_to_none=False)
        return norm, skip

    def before_update(self, call: Callable[[Tensor], None]) -> None:
        self.ahead = call

    def shards(self) -> dict[str, Piece]:
        return {name: whole(parameter) for name, parameter in self.named.items()}

    def publish(self) -> None:
        """Nothing: the shards are what the model computes with."""

    def save(self) -> dict[str, Tensor | Piece]:
        tensors: dict[str, Tensor | Piece] = {f"model/{name}": p.detach() for name, p in self.mine.items()}
        state = save_optimizer(self.oss.optim, self.mine, lambda _, value: value)
        return tensors | {key: value for key, value in state.items() if "group/" not in key or self.env.is_main}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"model/{name}"])
        load_optimizer(
            self.oss.optim, self.mine, tensors, lambda parameter, key: tensors[key].to(parameter.device, copy=True)
        )

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
