"""How parameters, gradients and optimizer state are spread over the ranks.

A strategy has six verbs, and the trainer never asks which one it has. Clipping and accumulation are among them,
because some strategies own both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..cluster.env import RunEnv


class Sharding(Protocol):
    """One strategy, on one rank."""

    optimizer: Optimizer

    def prepare(self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> nn.Module:
        """Spread ``model`` (already frozen as it will stay); gives the module to call."""

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of a micro-batch: gradients travel in the last one only."""

    def backward(self, loss: Tensor) -> None: ...

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip to ``max_norm`` (0: not at all) and update; or leave everything as it is where the gradient is not
        finite, on all ranks alike.
        Gives the gradient's norm before clipping and whether the step was skipped (scalars, on the device)."""

    def save(self) -> dict[str, Tensor]:
        """This rank's share of weights and optimizer state, for a resume checkpoint. Empty: others hold it."""

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, whole, in fp32, on the CPU of rank 0."""


def make_sharding(strategy: str, env: RunEnv) -> Sharding:
    """
    Raises:
        ConfigError: the strategy does not fit the world size.
    """
    from .ddp import Replicated

    if strategy == "none" and env.world > 1:
        raise ConfigError(f'sharding.strategy = "none" with {env.world} ranks; use "ddp"')
    return Replicated(env)
