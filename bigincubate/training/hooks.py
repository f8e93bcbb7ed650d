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

BATCH_SOURCE = "BIGINCUBATE_BATCH_SOURCE"  # environment variable: "package.module:function"


class LearningRateHook(Protocol):
    """Multiplies the learning rates of each step by a gain that it computes from the gradients.

    ``optim.lr_scaling = "package.module:Class"`` chooses one. The class registers itself with
    `Sharding.register_pre_step_hook`; the trainer logs its gain and keeps its state in checkpoints.

    Args:
        model: The model with its parameters frozen as in training, before the sharding wraps it.
        settings: The settings of the phase.
        sharding: The sharding before its ``prepare``.
        env: The ranks of the phase.
        micro_batches: Number of micro-batches per rank and step.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, sharding: Sharding, env: DistributedContext, micro_batches: int
    ) -> None: ...

    @property
    def gain(self) -> float:
        """The factor by which the last step's learning rates were multiplied."""

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, equal on all ranks."""

    def load_state(self, state: dict[str, float]) -> None:
        """Restore what `state` returned.

        Raises:
            ConfigError: The state does not fit this run.
        """


def make_learning_rate_hook(
    model: nn.Module, settings: Settings, sharding: Sharding, env: DistributedContext, micro_batches: int
) -> LearningRateHook | None:
    """Return the hook that ``optim.lr_scaling`` names, or None for a built-in rule.

    Raises:
        ConfigError: The name cannot be loaded, or the hook refuses this run.
    """
    name = settings.optim.lr_scaling
    if ":" not in name:
        return None
    return load_object(name, key="optim.lr_scaling")(model, settings, sharding, env, micro_batches)


def apply_batch_source(stream: TrainBatches, context: PhaseContext) -> TrainBatches:
    """Return the stream to train from: ``stream``, or what a batch source makes of it.

    A batch source is a function of the same arguments, named by the environment variable `BATCH_SOURCE`. It must yield
    the batches that ``stream`` would. The variable is removed, so that it reaches no child process.

    Args:
        stream: The phase's own stream on this rank.
        context: The phase.

    Raises:
        ConfigError: The name cannot be loaded.
    """
    if (name := os.environ.pop(BATCH_SOURCE, None)) is None:
        return stream
    return load_object(name, key=BATCH_SOURCE)(stream, context)
