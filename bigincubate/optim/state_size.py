"""Size of the optimizer state of each trainable parameter, computed without allocating memory."""

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
class ParamInfo:
    """A parameter and the size of its optimizer state.

    Attributes:
        name: Name in the model.
        shape: Shape of the parameter.
        group: Index of the optimizer's parameter group; -1 if the parameter is frozen.
        state_bytes_per_element: Bytes per element in state tensors of the parameter's shape.
        extra_state_bytes: Bytes in state tensors of other shapes.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    state_bytes_per_element: int
    extra_state_bytes: int


def trainable_param_info(
    model: nn.Module, settings: Settings, wrap: Callable[[Optimizer], Optimizer] = lambda optimizer: optimizer
) -> list[ParamInfo]:
    """Return the trainable parameters in the optimizer's order, with the size of their optimizer state.

    The optimizer takes one step on fake tensors, so no memory is allocated.

    Args:
        model: The model, which may be on the meta device; it is not changed.
        settings: Settings of the phase.
        wrap: Takes the optimizer and returns the one that determines groups and order.

    Raises:
        ConfigError: The optimizer does not exist, or ``wrap`` does not support it.
    """
    model = copy.deepcopy(model)
    with FakeTensorMode(), _ScalarsAreOneHalf():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
                fake.grad = torch.empty(parameter.shape) if parameter.requires_grad else None
                module.register_parameter(name, fake)
        optimizer = make_optimizer(model, settings)
        optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ParamInfo(names[parameter], tuple(parameter.shape), index, *_state_bytes(parameter, optimizer.state[parameter]))
        for index, group in enumerate(wrap(optimizer).param_groups)
        for parameter in group["params"]
    ]


def _state_bytes(parameter: Tensor, state: Mapping[str, Any]) -> tuple[int, int]:
    """Return bytes per element in tensors of the parameter's shape, and bytes in all other tensors."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    per_element = sum(tensor.element_size() for tensor in tensors if tensor.shape == parameter.shape)
    return per_element, sum(tensor.nbytes for tensor in tensors if tensor.shape != parameter.shape)


class _ScalarsAreOneHalf(TorchDispatchMode):
    """Return 0.5 if an optimizer reads the value of a fake tensor, which has none.

    With 0 or 1, optimizers that divide by the value or by its difference from 1 would fail, as NAdam does.
    """

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return 0.5
        return operator(*arguments, **(options or {}))
