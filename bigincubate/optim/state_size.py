"""Bytes of optimizer state for each trainable parameter, counted without allocating memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from ..config import Settings
from .optimizer import make_optimizer


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
