"""Optimizer and schedule of a phase, both timm's."""

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
    """The peak learning rate: ``lr * (batch_size / lr_base_batch)``, or its square root, or ``lr`` as it stands, which
    :mod:`.adascale` then multiplies step by step."""
    ratio = settings.train.batch_size / settings.optim.lr_base_batch
    return settings.train.lr * {"linear": ratio, "sqrt": ratio**0.5}.get(settings.optim.lr_scaling, 1.0)


def make_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """The optimizer over the trainable parameters of ``model``. Weight decay spares norms, biases and what the model
    itself excepts (position embedding, class token).

    Raises:
        ConfigError: timm has no such optimizer, or it does not take these settings.
    """
    optim = settings.optim
    extra: dict[str, Any] = {"eps": optim.eps, "betas": tuple(optim.betas)}  # timm leaves out what does not apply
    try:
        info = get_optimizer_info(optim.name)
        if reason := _unsupported(info, len(optim.betas)):
            raise ValueError(reason)
        if optim.name in ("adamw", "adam"):
            extra["fused"] = True
        if info.opt_class is Lamb:
            extra["max_grad_norm"] = None  # timm's LAMB clips by itself; the trainer already does
        return create_optimizer_v2(
            model,
            opt=optim.name,
            lr=scaled_lr(settings),
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            **extra,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optim.name = {optim.name!r}: {str(error) or 'not an optimizer of timm'}") from None


def _unsupported(info: OptimInfo, betas: int) -> str | None:
    """Why an optimizer of timm cannot be used; None if it can."""
    if info.second_order:
        return "it needs second derivatives, which are not computed"
    if info.opt_class is Kron:
        return "it draws random numbers, which would not survive a resume"
    if info.has_betas and info.num_betas != betas:
        return f"it takes {info.num_betas} betas, optim.betas has {betas}"
    return None


def make_schedule(optimizer: Optimizer, settings: Settings, total: int, steps_per_epoch: int) -> Scheduler:
    """The learning rate as a pure function of the optimizer step; ``schedule.step_update(step)`` sets it.

    Raises:
        ConfigError: the warm-up is as long as the phase.
    """
    warmup = round(settings.schedule.warmup_epochs * steps_per_epoch)
    if warmup and warmup >= total > 0:
        raise ConfigError(f"schedule.warmup_epochs is {warmup} steps, but the phase has only {total}")
    constant = settings.schedule.name == "constant"
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total, 1),
        lr_min=scaled_lr(settings) if constant else settings.schedule.min_lr,
        warmup_t=warmup,
        warmup_lr_init=settings.schedule.warmup_lr,
        t_in_epochs=False,
    )
