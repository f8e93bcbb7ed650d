"""How a global batch is divided over ranks and into micro-batches."""

from __future__ import annotations

from .. import config
from ..errors import ConfigError


def check_mixing_layout(mixup: config.MixupConfig, *, batch_size: int, world: int = 1, micro_batches: int = 1) -> None:
    """Check that two rows that are mixed with each other are always in the same micro-batch.

    Args:
        mixup: The mixing settings; without mixing, every layout is accepted.
        batch_size: Rows of a global batch.
        world: Number of ranks.
        micro_batches: Micro-batches per step on each rank.

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
    """Return the number of micro-batches into which each rank divides its share of a global batch.

    Args:
        settings: The settings of a phase.
        world: Number of ranks.

    Raises:
        ConfigError: If the batch cannot be divided evenly.
    """
    train = settings.train
    if train.batch_size % world:
        raise ConfigError(
            f"train.batch_size = {train.batch_size} is not divisible by {world} ranks; use a multiple of {world}"
        )
    share = train.batch_size // world
    count = 1 if train.micro_batch is None else -(-share // train.micro_batch)
    if share % count:
        raise ConfigError(
            f"train.micro_batch = {train.micro_batch} does not divide the {share} samples of a rank evenly; use a"
            f" divisor of {share}"
        )
    check_mixing_layout(settings.mixup, batch_size=train.batch_size, world=world, micro_batches=count)
    return count
