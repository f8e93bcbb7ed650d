"""Optimizer and learning-rate schedule of a phase, both from timm."""

from __future__ import annotations

from typing import Any

from timm.optim import Lamb, OptimInfo, create_optimizer_v2, get_optimizer_info
from timm.optim.kron import Kron
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from ..config import Settings
from ..errors import ConfigError


def scaled_lr(settings: Settings) -> float:
    """Return the peak learning rate: ``train.lr`` times a factor that depends on ``optim.lr_scaling``.

    The factor is ``batch_size / lr_base_batch`` for "linear", its square root for "sqrt", and 1 for "none" and for a
    learning-rate hook, which scales the result in each step.
    """
    ratio = settings.train.batch_size / settings.optim.lr_base_batch
    return settings.train.lr * {"linear": ratio, "sqrt": ratio**0.5}.get(settings.optim.lr_scaling, 1.0)


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


def _unsupported(info: OptimInfo, betas: int) -> str | None:
    """Return the reason why an optimizer of timm is not supported, or None if it is supported."""
    if info.second_order:
        return "it needs second derivatives, which the trainer does not compute"
    if info.opt_class is Kron:
        return "it draws random numbers, so a resumed run would differ"
    if info.has_betas and info.num_betas != betas:
        return f"it takes {info.num_betas} betas, but optim.betas has {betas}"
    return None


def make_schedule(optimizer: Optimizer, settings: Settings, total: int, steps_per_epoch: int) -> Scheduler:
    """Return the learning-rate schedule, a pure function of the optimizer step: ``schedule.step_update(step)``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        settings: Settings of the phase.
        total: Optimizer steps of the phase.
        steps_per_epoch: Optimizer steps of an epoch.

    Raises:
        ConfigError: The warm-up is at least as long as the phase.
    """
    warmup = round(settings.schedule.warmup_epochs * steps_per_epoch)
    if warmup and warmup >= total > 0:
        raise ConfigError(f"schedule.warmup_epochs is {warmup} steps, but the phase has only {total}; lower it")
    constant = settings.schedule.name == "constant"
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total, 1),
        lr_min=scaled_lr(settings) if constant else settings.schedule.min_lr,
        warmup_t=warmup,
        warmup_lr_init=settings.schedule.warmup_lr,
        t_in_epochs=False,
    )
