"""Optimizer and schedule of a phase, both timm's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lamb, OptimInfo, create_optimizer_v2, get_optimizer_info
from timm.optim.kron import Kron
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from .checkpoint.pieces import Piece, PieceReader
from .config import Settings
from .errors import ConfigError


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


@dataclass(frozen=True)
class Trained:
    """A trainable parameter, and the bytes that the optimizer keeps of it."""

    name: str
    shape: tuple[int, ...]
    group: int  # of the optimizer
    each: int  # bytes for each element, in tensors of the parameter's shape
    beside: int  # bytes in tensors of other shapes


def trained(
    model: nn.Module, settings: Settings, client: Callable[[Optimizer], Optimizer] = lambda plain: plain
) -> list[Trained]:
    """What the optimizer would train and keep of ``model``, which may be on the meta device: made and stepped once on
    fake tensors, so nothing is allocated, and looked at. In its own order; groups are those of what ``client`` makes of
    the optimizer."""
    model = copy.deepcopy(model)
    with FakeTensorMode(), _Ones():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
                fake.grad = torch.empty(parameter.shape) if parameter.requires_grad else None
                module.register_parameter(name, fake)
        optimizer = make_optimizer(model, settings)
        optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        Trained(names[parameter], tuple(parameter.shape), group, *_kept(parameter, optimizer.state[parameter]))
        for group, of in enumerate(client(optimizer).param_groups)
        for parameter in of["params"]
    ]


def _kept(parameter: Tensor, state: Mapping[str, Any]) -> tuple[int, int]:
    each = beside = 0
    for value in state.values():
        if isinstance(value, Tensor):
            if value.shape == parameter.shape:
                each += value.element_size()
            else:
                beside += value.numel() * value.element_size()
    return each, beside


class _Ones(TorchDispatchMode):
    """Fake tensors have no values: to an optimizer that asks for one, it is one."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return operator(*arguments, **(options or {}))


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


class Ema:
    """A moving average of the trainable parameters, of what this rank has of them, in their own dtype and place."""

    def __init__(self, shards: Mapping[str, Piece], decay: float) -> None:
        self.decay = decay
        self.shards = dict(shards) if decay else {}
        self.average = {name: piece.tensor.clone() for name, piece in self.shards.items()}

    @torch.no_grad()
    def update(self) -> None:
        if self.average:
            own = [piece.tensor for piece in self.shards.values()]
            torch._foreach_lerp_(list(self.average.values()), own, 1 - self.decay)

    def save(self) -> dict[str, Piece]:
        return {
            f"ema/{name}": Piece(value, self.shards[name].offset, self.shards[name].shape)
            for name, value in self.average.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(tensors, PieceReader)
        for name, value in self.average.items():
            part = tensors.part(f"ema/{name}", self.shards[name].offset, value.numel())
            value.copy_(part.view(value.shape))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the model's own weights; again to put them back."""
        for name, value in self.average.items():
            own = self.shards[name].tensor.clone()
            self.shards[name].tensor.copy_(value)
            value.copy_(own)
