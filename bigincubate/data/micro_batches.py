"""How a global batch is cut over ranks and micro-batches."""

from __future__ import annotations

from .. import config
from ..errors import ConfigError


def check_mixing_layout(mixup: config.MixupConfig, *, batch_size: int, world: int = 1, micro_batches: int = 1) -> None:
    """Refuse a layout that would put two rows that are mixed with each other into different micro-batches.

    Args:
        mixup: The mixing settings; without mixing every layout is fine.
        batch_size: Rows of a global batch.
        world: Number of ranks.
        micro_batches: Micro-batches of each rank.

    Raises:
        ConfigError: If mixing is on and batch_size is not a multiple of 2 x world x micro_batches.
    """
    parts = 2 * world * micro_batches
    if mixup.active and batch_size % parts:
        raise ConfigError(
            f"mixup pairs samples inside a micro-batch: train.batch_size = {batch_size} must be a multiple of {parts} "
            f"(2 x {world} ranks x {micro_batches} micro-batches)"
        )


def count_micro_batches(settings: config.Settings, world: int) -> int:
    """Return the number of micro-batches that each rank cuts its share of a global batch into.

    Args:
        settings: The settings of a phase.
        world: Number of ranks.

    Raises:
        ConfigError: If the batch cannot be divided evenly.
    """
    train = settings.train
    if train.batch_size % world:
        raise ConfigError(
            f"train.batch_size = {train.batch_size} cannot be shared by {world} ranks; use a multiple of {world}"
        )
    share = train.batch_size // world
    count = 1 if train.micro_batch is None else -(-share // train.micro_batch)
    if share % count:
        raise ConfigError(f"train.micro_batch = {train.micro_batch} does not divide a rank's share of {share} evenly")
    check_mixing_layout(settings.mixup, batch_size=train.batch_size, world=world, micro_batches=count)
    return count
