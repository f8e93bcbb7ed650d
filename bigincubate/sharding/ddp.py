"""Every rank holds everything: a single process, and DDP over several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..cluster.env import RunEnv

NUMBER = "number/"  # before the path of what is not a tensor


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
        self.ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
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
                tensors |= _packed(f"optim/{key}/{name}", value)
        for index, group in enumerate(self.optimizer.param_groups):
            if "step" in group:  # timm's LAMB counts by group
                tensors |= _packed(f"group/step/{index}", group["step"])
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        fused = self.optimizer.defaults.get("fused")
        for path, value in tensors.items():
            kind, _, rest = path.removeprefix(NUMBER).partition("/")
            key, _, name = rest.partition("/")
            if kind == "model":
                with torch.no_grad():
                    self.named[rest].copy_(value)
            elif kind == "optim":
                parameter = self.named[name]
                on_host = key == "step" and not fused
                own = value.clone() if on_host else value.to(parameter.device, copy=True)
                self.optimizer.state[parameter][key] = _unpacked(path, own)
            elif kind == "group":
                self.optimizer.param_groups[int(name)][key] = _unpacked(path, value.clone())

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}


def _packed(path: str, value: Any) -> dict[str, Tensor]:
    """What an optimizer keeps, as a tensor. Some keep numbers of Python, and would compute otherwise with tensors: a
    number travels as 64 bits and comes back as one."""
    if isinstance(value, Tensor):
        return {path: value}
    return {NUMBER + path: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)}


def _unpacked(path: str, value: Tensor) -> Any:
    return value.item() if path.startswith(NUMBER) else value
