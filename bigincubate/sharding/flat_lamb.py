"""LAMB where a rank holds a slice of each parameter: trust ratios are still those of whole parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import Lamb
from torch import Tensor


class FlatLamb(Lamb):
    """timm's LAMB (You et al., 2020, arXiv:1904.00962, without its own clipping) on flat slices, a parameter a group.

    A trust ratio is the norm of a parameter over the norm of its update. Each rank squares and adds what it has, and
    the sums over the ranks are the same everywhere. So all ranks must step through the groups in one order, which
    ZeRO does; zeros that pad the last slice change nothing.
    """

    @classmethod
    def of(cls, plain: Lamb) -> FlatLamb:
        """``plain``, with a group for each parameter. ``group["origin"]`` is the index of the group it comes from."""
        return cls(
            [
                {**group, "params": [parameter], "origin": index}
                for index, group in enumerate(plain.param_groups)
                for parameter in group["params"]
            ]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update the groups that have a slice now: ZeRO calls for one parameter after the other."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._update(group, parameter)

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        group["step"] = group.get("step", torch.zeros(())) + 1
        count, (beta1, beta2) = group["step"].item(), group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (square.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
        update = (mean / (1 - beta1**count)).div_(scale)
        if group["weight_decay"]:  # like timm: what is spared from decay has no ratio
            update.add_(parameter, alpha=group["weight_decay"])
            update.mul_(trust_ratio(parameter, update, clip=group["trust_clip"]))
        parameter.add_(update, alpha=-group["lr"])


def trust_ratio(parameter: Tensor, update: Tensor, *, clip: bool) -> Tensor:
    """``|parameter| / |update|`` over all ranks (scalar); 1 where either is zero."""
    squares = torch.stack([parameter.square().sum(), update.square().sum()])
    dist.all_reduce(squares)
    weight, change = squares.sqrt()
    ratio = torch.where((weight > 0) & (change > 0), weight / change, 1.0)
    return ratio.clamp(max=1.0) if clip else ratio
