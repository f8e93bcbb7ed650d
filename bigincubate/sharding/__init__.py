"""How parameters, gradients and optimizer state are spread over the ranks.

A strategy has a few verbs, and the trainer never asks which one it has. Clipping and accumulation are among them,
because some strategies own both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..checkpoint.pieces import Piece
    from ..cluster.env import RunEnv
    from ..config import Settings


class Sharding(Protocol):
    """One strategy, on one rank."""

    optimizer: Optimizer
    gathers: bool  # the forward needs all ranks at once: each must call it as often as the others

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Spread ``model`` (already frozen as it will stay) by ``units``, the paths of its blocks; gives the module to
        call."""

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of a micro-batch: gradients travel in the last one only."""

    def backward(self, loss: Tensor) -> None: ...

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip to ``max_norm`` (0: not at all) and update; or leave everything as it is where the gradient is not
        finite, on all ranks alike.
        Gives the gradient's norm before clipping and whether the step was skipped (scalars, on the device)."""

    def before_update(self, call: Callable[[Tensor], None]) -> None:
        """From now on call this ahead of every update, on all ranks, with the norm of the gradient before clipping
        (scalar): it may change learning rates.

        Raises:
            ConfigError: a backward gives a rank no whole gradients of its own samples.
        """

    def shards(self) -> dict[str, Piece]:
        """The trainable parameters, or what this rank has of them, by name: the very tensors, not copies."""

    def publish(self) -> None:
        """After the tensors of :meth:`shards` were written to: the model computes with what they are now."""

    def save(self) -> dict[str, Tensor | Piece]:
        """This rank's share of weights and optimizer state, for a resume checkpoint; nothing is gathered. Empty: others
        hold it. Keys as in :mod:`.state`."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what any strategy saved, at any world size."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, whole, in fp32, on the CPU. On all ranks together."""


def make_sharding(settings: Settings, env: RunEnv, micro_batches: int = 1) -> Sharding:
    """
    Args:
        micro_batches: how many of them make a rank's share of a batch.

    Raises:
        ConfigError: the strategy does not fit the world size, or its own configuration not the recipe.
    """
    chosen = settings.sharding
    if chosen.strategy == "none" and env.world > 1:
        raise ConfigError(f'sharding.strategy = "none" with {env.world} ranks; use "ddp"')
    if chosen.strategy == "zero3" and settings.train.compile:
        raise ConfigError(
            'sharding.strategy = "zero3" fails or hangs with train.compile; use "fsdp2", or do not compile'
        )
    if (
        chosen.strategy == "zero3" and settings.train.skip_unused
    ):  # it gathers a layer's weights in that layer's forward
        raise ConfigError('sharding.strategy = "zero3" does not go with train.skip_unused; use "fsdp2", or do not skip')
    if chosen.strategy == "zero3" and chosen.activation_checkpointing == "selective":
        # weights are gathered inside of what is computed twice, differently each time
        raise ConfigError(
            'sharding.strategy = "zero3" fails with activation_checkpointing = "selective"; use "every", or "fsdp2"'
        )
    if chosen.strategy.startswith("zero"):
        from .zero_config import deepspeed_config

        config = deepspeed_config(settings, world=env.world, micro_batches=micro_batches)
    if chosen.strategy in ("none", "ddp") or env.world == 1:  # one process holds everything, whatever it is called
        from .ddp import Replicated

        return Replicated(env, micro_batches)
    if chosen.strategy == "fsdp2":
        from .fsdp2 import FullyShard

        return FullyShard(env, chosen.fsdp2, settings.train.precision)
    if chosen.strategy == "oss":
        from .oss import OptimizerStateSharding

        return OptimizerStateSharding(env)
    from .zero import Zero

    return Zero(env, config)
