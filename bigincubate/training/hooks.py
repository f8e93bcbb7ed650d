"""Extensions of the training loop, loaded by name."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from ..cluster.env import RunEnv
from ..config import Settings
from ..imports import load_object
from ..sharding import Sharding


class LearningRateHook(Protocol):
    """Multiplies the learning rates of each step by a gain that it computes from the gradients.

    ``optim.lr_scaling = "package.module:Class"`` chooses one. The class registers itself with
    `Sharding.before_update`; the trainer logs its gain and keeps its state in checkpoints.

    Args:
        model: The model with its parameters frozen as in training, before the sharding wraps it.
        settings: The settings of the phase.
        sharding: The sharding before its ``prepare``.
        env: The ranks of the phase.
        micro_batches: Number of micro-batches per rank and step.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, sharding: Sharding, env: RunEnv, micro_batches: int
    ) -> None: ...

    @property
    def gain(self) -> float:
        """The factor by which the last step's learning rates were multiplied."""
        ...

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, equal on all ranks."""
        ...

    def load_state(self, state: dict[str, float]) -> None:
        """Restore what `state` returned.

        Raises:
            ConfigError: The state does not fit this run.
        """
        ...


def make_learning_rate_hook(
    model: nn.Module, settings: Settings, sharding: Sharding, env: RunEnv, micro_batches: int
) -> LearningRateHook | None:
    """Return the hook that ``optim.lr_scaling`` names, or None for a built-in rule.

    Raises:
        ConfigError: The name cannot be loaded, or the hook refuses this run.
    """
    name = settings.optim.lr_scaling
    if ":" not in name:
        return None
    hook: LearningRateHook = load_object(name, key="optim.lr_scaling")(model, settings, sharding, env, micro_batches)
    return hook
