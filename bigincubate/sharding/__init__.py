"""How parameters, gradients and optimizer state are distributed over the ranks.

Every strategy implements the protocol :class:`Sharding`, and the trainer does not know which one it uses. Clipping and
gradient accumulation are part of the protocol because some strategies implement both themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import Settings
    from ..distributed.process_group import DistributedContext
    from ..storage.sharded_tensors import TensorShard


class Sharding(Protocol):
    """A sharding strategy on one rank.

    Attributes:
        optimizer: the optimizer whose ``param_groups`` have the learning rates. Set by :meth:`prepare`.
        forward_is_collective: whether the forward runs collectives, so that all ranks must call it equally often.
    """

    optimizer: Optimizer
    forward_is_collective: bool

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Shard a model and create its optimizer.

        Args:
            model: the model on its device. Parameters are already frozen; this must not change later.
            units: paths of its blocks, each of which is sharded as a unit.
            make_optimizer: creates the optimizer of a model's trainable parameters.

        Returns:
            The module to call in training.
        """

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context for forward and backward of a micro-batch: gradients are reduced in the last one only."""

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of ``loss`` (scalar) and add them to those of earlier micro-batches."""

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip the gradient, update the weights and clear the gradient.

        If the gradient is not finite, all ranks skip the update: weights and optimizer state do not change.

        Args:
            max_norm: maximum L2 norm of the gradient; 0 turns clipping off.

        Returns:
            The norm before clipping and whether the update was skipped, both scalars on the device.
        """

    def register_pre_step_hook(self, hook: Callable[[Tensor], None]) -> None:
        """Call a function before every update on all ranks.

        Args:
            hook: takes the norm of the gradient before clipping (scalar); may change learning rates.

        Raises:
            ConfigError: the strategy never has the full gradients of a rank's own samples.
        """

    def local_shards(self) -> dict[str, TensorShard]:
        """Return this rank's shards of the trainable parameters by name: the tensors themselves, not copies."""

    def sync_weights_from_master(self) -> None:
        """Copy values that were written to the local shards into the weights that the model computes with."""

    def save(self) -> dict[str, Tensor | TensorShard]:
        """Return this rank's part of weights and optimizer state for a checkpoint, without communication.

        Keys are those of :mod:`.state`. Empty if other ranks have everything.
        """

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore weights and optimizer state that any strategy saved at any world size."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers, unsharded, in fp32 on the CPU. Collective."""


def make_sharding(settings: Settings, env: DistributedContext, micro_batches: int = 1) -> Sharding:
    """Return the strategy that ``settings`` choose. With one process, every strategy is :class:`.ddp.Replicated`.

    Args:
        settings: settings of the phase.
        env: the process group.
        micro_batches: micro-batches per step on each rank.

    Raises:
        ConfigError: the strategy does not support the world size or other settings, or its DeepSpeed file contradicts
            the recipe.
    """
    chosen = settings.sharding
    if chosen.strategy == "none" and env.world > 1:
        raise ConfigError(f'sharding.strategy = "none" with {env.world} ranks; use "ddp"')
    if chosen.strategy == "zero3" and settings.train.compile:
        raise ConfigError('sharding.strategy = "zero3" fails or hangs with train.compile; use "fsdp2" or turn it off')
    for key in ("subset_drop_path", "last_block_cls_only"):
        # both read weights without calling their layer, whose forward is where ZeRO-3 gathers them
        if chosen.strategy == "zero3" and getattr(settings.train, key):
            raise ConfigError(f'sharding.strategy = "zero3" does not support train.{key}; use "fsdp2" or turn it off')
    if chosen.strategy == "zero3" and chosen.activation_checkpointing == "selective":
        # weights are gathered inside the recomputed region, differently in each of the two passes
        raise ConfigError(
            'sharding.strategy = "zero3" fails with activation_checkpointing = "selective"; use "full" or "fsdp2"'
        )
    if chosen.strategy.startswith("zero"):
        from .zero_config import deepspeed_config

        config = deepspeed_config(settings, world=env.world, micro_batches=micro_batches)
    if chosen.strategy in ("none", "ddp") or env.world == 1:
        from .ddp import Replicated

        return Replicated(env, micro_batches)
    if chosen.strategy == "fsdp2":
        from .fsdp2 import FullyShard

        return FullyShard(env, chosen.fsdp2, settings.train.precision)
    if chosen.strategy == "oss":
        from .oss import OptimizerStateSharding

        return OptimizerStateSharding(env)
    if chosen.strategy.startswith("zero"):
        from .zero import Zero

        return Zero(env, config)
    raise AssertionError(f"no strategy for sharding.strategy = {chosen.strategy!r}")
