"""Every rank holds everything: a single process, and DDP over several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..checkpoint.pieces import Piece, whole
from ..cluster.env import RunEnv
from ..compat.torch import skip_fused_step_if
from .gradients import clip_gradients
from .state import load_optimizer, save_optimizer


class Replicated:
    """The model is frozen before it is wrapped, so that only trainable gradients are bucketed and travel."""

    optimizer: Optimizer
    gathers = False

    def __init__(self, env: RunEnv, micro_batches: int = 1) -> None:
        self.env, self.micro_batches = env, micro_batches
        self.ddp: DistributedDataParallel | None = None
        self.ahead: Callable[[Tensor], None] | None = None

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        self.model = model
        self.named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = make_optimizer(model)
        if self.env.world == 1:
            return model
        ids = [self.env.device.index] if self.env.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # broadcast_buffers is renamed in 2.15, and not there in 2.11
            self.ddp = DistributedDataParallel(
                model,
                device_ids=ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=self.micro_batches == 1,  # its first step cannot be under no_sync
            )
        return self.ddp

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return self.ddp.no_sync() if self.ddp and not last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        norm = clip_gradients(self.named.values(), max_norm)
        if self.ahead:
            self.ahead(norm)
        skip = ~torch.isfinite(norm)
        if self.optimizer.defaults.get("fused"):
            skip_fused_step_if(self.optimizer, skip)
            self.optimizer.step()
        elif not bool(skip):
            self.optimizer.step()
        # DDP's gradients are views of its buckets: zeroed in place they stay so
        self.optimizer.zero_grad(set_to_none=self.ddp is None)
        return norm, skip

    def before_update(self, call: Callable[[Tensor], None]) -> None:
        self.ahead = call

    def shards(self) -> dict[str, Piece]:
        return {name: whole(parameter) for name, parameter in self.named.items()}

    def publish(self) -> None:
        """Nothing: the shards are what the model computes with."""

    def save(self) -> dict[str, Tensor | Piece]:
        if not self.env.is_main:
            return {}
        tensors: dict[str, Tensor | Piece] = {f"model/{name}": p.detach() for name, p in self.named.items()}
        return tensors | save_optimizer(self.optimizer, self.named, lambda _, value: value)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"model/{name}"])
        load_optimizer(
            self.optimizer, self.named, tensors, lambda parameter, key: tensors[key].to(parameter.device, copy=True)
        )

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
