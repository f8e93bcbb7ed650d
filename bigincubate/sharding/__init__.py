"""Strategies to distribute parameters, gradients and optimizer state over the ranks.

Every strategy implements :class:`Sharding`, and the trainer is independent of the strategy. Gradient clipping and
accumulation are part of the interface, because some strategies implement both themselves.
"""

from __future__ import annotations

from ..config import Settings
from ..distributed.process_group import DistributedContext
from ..errors import ConfigError
from .base import Sharding

__all__ = ["Sharding", "make_sharding"]


def make_sharding(settings: Settings, env: DistributedContext, micro_batches: int = 1) -> Sharding:
    """Return the sharding strategy of ``settings``. With one process, this is always :class:`.ddp.Replicated`.

    Args:
        settings: Settings of the phase.
        env: The process group.
        micro_batches: Micro-batches per step on each rank.

    Raises:
        ConfigError: The strategy does not support the world size or other settings, or its DeepSpeed file contradicts
            the recipe.
    """
    chosen = settings.sharding
    if chosen.strategy == "none" and env.world > 1:
        raise ConfigError(f'sharding.strategy = "none" with {env.world} ranks; use "ddp"')
    if chosen.strategy == "zero3" and settings.train.compile:
        raise ConfigError(
            'sharding.strategy = "zero3" fails or hangs with train.compile; use "fsdp2" or set it to false'
        )
    for key in ("subset_drop_path", "last_block_cls_only"):
        # both read weights without calling their layer; ZeRO-3 gathers weights only in the forward of their layer
        if chosen.strategy == "zero3" and getattr(settings.train, key):
            raise ConfigError(
                f'sharding.strategy = "zero3" does not support train.{key}; use "fsdp2" or set it to false'
            )
    if chosen.strategy == "zero3" and chosen.activation_checkpointing == "selective":
        # weights are gathered inside the recomputed region, differently in the forward and in the recomputation
        raise ConfigError(
            'sharding.strategy = "zero3" fails with sharding.activation_checkpointing = "selective"; use "full", or'
            ' strategy "fsdp2"'
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
