"""Extensions of the training loop, loaded by name."""

from __future__ import annotations

import os
from typing import Protocol

from torch import nn

from ..config import Settings
from ..config.objects import load_object
from ..distributed.process_group import DistributedContext
from ..planning.context import PhaseContext
from ..sharding import Sharding
from ..tasks.base import TrainBatches

HOOK_ARGUMENTS = ("model", "settings", "sharding", "env", "micro_batches")
BATCH_SOURCE = "BIGINCUBATE_BATCH_SOURCE"  # environment variable: "package.module:function"


class LearningRateHook(Protocol):
    """A class that multiplies the learning rates of each step by a gain computed from the gradients.

    Selected by ``optim.lr_scaling = "package.module:Class"``. The class registers itself with
    `Sharding.register_pre_step_hook`. The trainer logs its gain and saves its state in checkpoints.

    Args:
        model: The model before the sharding strategy wraps it, with frozen parameters already frozen.
        settings: The settings of the phase.
        sharding: The sharding strategy before the call of ``prepare``.
        env: The process group.
        micro_batches: Number of micro-batches per rank and step.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, sharding: Sharding, env: DistributedContext, micro_batches: int
    ) -> None: ...

    @property
    def gain(self) -> float:
        """The factor that the learning rates of the last step were multiplied by."""

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, equal on all ranks."""

    def load_state(self, state: dict[str, float]) -> None:
        """Restore a state returned by `state`.

        Raises:
            ConfigError: The state does not fit this run.
        """


def make_learning_rate_hook(
    model: nn.Module, settings: Settings, sharding: Sharding, env: DistributedContext, micro_batches: int
) -> LearningRateHook | None:
    """Return the hook that ``optim.lr_scaling`` names, or None for a built-in rule.

    Raises:
        ConfigError: The name cannot be loaded, or the hook does not support this run.
    """
    name = settings.optim.lr_scaling
    if ":" not in name:
        return None
    return load_object(name, *HOOK_ARGUMENTS, key="optim.lr_scaling")(model, settings, sharding, env, micro_batches)


def apply_batch_source(stream: TrainBatches, context: PhaseContext) -> TrainBatches:
    """Return ``stream``, or the stream that a batch source returns for it.

    A batch source is a function with the same arguments as this one, named by the environment variable `BATCH_SOURCE`.
    Its stream must yield the same batches as ``stream``. The variable is removed, so that child processes do not
    inherit it.

    Args:
        stream: The phase's training stream on this rank.
        context: The phase.

    Raises:
        ConfigError: The name cannot be loaded.
    """
    if (name := os.environ.pop(BATCH_SOURCE, None)) is None:
        return stream
    return load_object(name, "stream", "context", key=BATCH_SOURCE)(stream, context)
