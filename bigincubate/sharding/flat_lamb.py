"""Optimizers for ZeRO's flat slices of parameters; LAMB computes the trust ratios of full parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import Lamb, Lion
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ..errors import ConfigError

ELEMENTWISE = (Adam, AdamW, SGD, RMSprop, Lion)  # the update of an element depends on that element only


class FlatLamb(Lamb):
    """timm's LAMB (You et al., 2020, arXiv:1904.00962, without its own clipping) on flat slices.

    A trust ratio is the norm of a parameter divided by the norm of its update. There is one group per parameter, and
    squared norms of the slices are summed over the ranks, so all ranks must process the groups in the same order, as
    ZeRO does. Zeros that pad the last slice do not change the norms.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update the groups whose ``params`` are set. ZeRO calls this for each parameter group in turn."""
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
        if group["weight_decay"]:  # as in timm: parameters without weight decay have no trust ratio
            update.add_(parameter, alpha=group["weight_decay"])
            update.mul_(trust_ratio(parameter, update, clip=group["trust_clip"]))
        parameter.add_(update, alpha=-group["lr"])


def trust_ratio(parameter: Tensor, update: Tensor, *, clip: bool) -> Tensor:
    """Return ``|parameter| / |update|`` over all ranks (scalar), or 1 if either norm is zero. Collective."""
    squares = torch.stack([parameter.square().sum(), update.square().sum()])
    dist.all_reduce(squares)
    weight, change = squares.sqrt()
    ratio = torch.where((weight > 0) & (change > 0), weight / change, 1.0)
    return ratio.clamp(max=1.0) if clip else ratio


def flat_slice_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that DeepSpeed runs on flat slices in place of ``optimizer``.

    LAMB gets one group per parameter, where ``group["origin"]`` is the index of the original group.

    Raises:
        ConfigError: The optimizer cannot run on slices of tensors.
    """
    cautious = any(group.get("caution") for group in optimizer.param_groups)
    if type(optimizer) is Lamb and not cautious:
        return FlatLamb(
            [
                {**group, "params": [parameter], "origin": index}
                for index, group in enumerate(optimizer.param_groups)
                for parameter in group["params"]
            ]
        )
    if type(optimizer) not in ELEMENTWISE or cautious:
        raise ConfigError(
            f"optim.name: {type(optimizer).__name__}{' with caution' if cautious else ''} needs whole tensors, but with"
            ' ZeRO a rank has slices; use adamw, adam, sgd, rmsprop, lion or lamb, or sharding.strategy = "fsdp2"'
        )
    return optimizer
