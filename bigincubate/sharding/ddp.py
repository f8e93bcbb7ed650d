"""Every rank holds everything: a single process, and DDP over several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..cluster.env import RunEnv


class Replicated:
    """The model is frozen before it is wrapped, so that only trainable gradients are bucketed and travel."""

    optimizer: Optimizer

    def __init__(self, env: RunEnv) -> None:
        self.env = env
        self.ddp: DistributedDataParallel | None = None

    def prepare(self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> nn.Module:
        self.model = model
        self.named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = make_optimizer(model)
        if self.env.world == 1:
            return model
        ids = [self.env.device.index] if self.env.device.type == "cuda" else None
        self.ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        return self.ddp

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return self.ddp.no_sync() if self.ddp and not last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        parameters = list(self.named.values())
        limit = max_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        skip = ~torch.isfinite(norm)
        if self.optimizer.defaults.get("fused"):
            # a fused optimizer looks at the flag on the device: no step waits for the host
            self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(skip):
            self.optimizer.step()
        # DDP's gradients are views of its buckets: zeroed in place they stay so
        self.optimizer.zero_grad(set_to_none=self.ddp is None)
        return norm, skip

    def save(self) -> dict[str, Tensor]:
        if not self.env.is_main:
            return {}
        tensors = {f"model/{name}": parameter.detach() for name, parameter in self.named.items()}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optim/{key}/{name}"] = torch.as_tensor(value)
        for index, group in enumerate(self.optimizer.param_groups):
            if "step" in group:  # timm's LAMB counts by group
                tensors[f"group/{index}/step"] = torch.as_tensor(group["step"])
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        state = self.optimizer.state
        with torch.no_grad():
            for key, value in tensors.items():
                kind, first, rest = key.split("/", 2) if key.count("/") > 1 else (*key.split("/", 1), "")
                if kind == "model":
                    self.named[first].copy_(value)
                elif kind == "optim":
                    parameter = self.named[rest]
                    on_host = first == "step" and not self.optimizer.defaults.get("fused")
                    state[parameter][first] = value.clone() if on_host else value.to(parameter.device, copy=True)
                elif kind == "group":
                    group = self.optimizer.param_groups[int(first)]
                    old = group.get("step")
                    group["step"] = value.clone() if old is None or isinstance(old, Tensor) else value.item()

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
