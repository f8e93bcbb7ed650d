"""The optimizer of a phase, from timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import Lamb, OptimInfo, create_optimizer_v2, get_optimizer_info
from timm.optim.kron import Kron
from torch import nn
from torch.optim import Optimizer

from ..config import Settings
from ..errors import ConfigError
from .schedule import scaled_lr


def make_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """Return an optimizer of the trainable parameters of ``model``.

    Weight decay is not applied to norms, biases, and parameters that the model excludes (position embedding, class
    token).

    Raises:
        ConfigError: timm has no such optimizer, or the optimizer does not support these settings.
    """
    optim = settings.optim
    extra: dict[str, Any] = {"eps": optim.eps, "betas": tuple(optim.betas)}  # timm ignores those that do not apply
    try:
        info = get_optimizer_info(optim.name)
        if reason := _unsupported(info, len(optim.betas)):
            raise ValueError(reason)
        if optim.name in ("adamw", "adam"):
            extra["fused"] = True
        if info.opt_class is Lamb:
            extra["max_grad_norm"] = None  # the trainer clips gradients; timm's LAMB would clip them again
        return create_optimizer_v2(
            model,
            opt=optim.name,
            lr=scaled_lr(settings),
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            **extra,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optim.name = {optim.name!r}: {str(error) or 'timm has no such optimizer'}") from None


def counts_steps_together(settings: Settings) -> bool:
    """Return whether the optimizer counts the steps of all parameters of a group together, as timm's LAMB does."""
    optim = settings.optim.model_copy(update={"layer_decay": None})
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, settings.model_copy(update={"optim": optim}))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return any("step" in group for group in optimizer.param_groups)


def _unsupported(info: OptimInfo, betas: int) -> str | None:
    """Return the reason why an optimizer of timm is not supported, or None if it is supported."""
    if info.second_order:
        return "it needs second derivatives, which the trainer does not compute"
    if info.opt_class is Kron:
        return "it draws random numbers, so a resumed run would differ"
    if info.has_betas and info.num_betas != betas:
        return f"it takes {info.num_betas} betas, but optim.betas has {betas}"
    return None
