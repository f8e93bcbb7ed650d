"""How parameters, gradients and optimizer state are distributed over the ranks.

Every strategy implements :class:`Sharding`, and the trainer does not know which one it uses. Clipping and gradient
accumulation are part of the interface because some strategies implement both themselves.
"""

from __future__ import annotations

from ..config import Settings
from ..distributed.process_group import DistributedContext
from ..errors import ConfigError
from .base import Sharding

__all__ = ["Sharding", "make_sharding"]


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
