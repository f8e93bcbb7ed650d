"""Exponential moving average of the trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..storage.sharded_tensors import ShardedTensorReader, TensorShard


class Ema:
    """Moving average of this rank's shards of the trainable parameters, in their dtype and on their device.

    Args:
        shards: This rank's shards by parameter name.
        decay: Weight of the old average in an update; 0 turns averaging off.
    """

    def __init__(self, shards: Mapping[str, TensorShard], decay: float) -> None:
        self.decay = decay
        self.shards = dict(shards) if decay else {}
        self.average = {name: shard.tensor.clone() for name, shard in self.shards.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average: ``average = decay * average + (1 - decay) * weights``."""
        if self.average:
            weights = [shard.tensor for shard in self.shards.values()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay)

    def save(self) -> dict[str, TensorShard]:
        """Return the average for a checkpoint, with keys ``ema/NAME``."""
        return {
            f"ema/{name}": TensorShard(value, self.shards[name].offset, self.shards[name].shape)
            for name, value in self.average.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the average from a checkpoint that any strategy saved at any world size."""
        assert isinstance(tensors, ShardedTensorReader)
        for name, value in self.average.items():
            part = tensors.read_range(f"ema/{name}", self.shards[name].offset, value.numel())
            value.copy_(part.view(value.shape))

    @contextmanager
    def applied(self, sync: Callable[[], None]) -> Iterator[None]:
        """Use the average as the model's weights inside the context, and restore the weights on exit.

        Copy tensors of the model that are used after exit.

        Args:
            sync: Called after the shards have changed, to copy them to the weights that the model computes with.
        """
        self._swap()
        sync()
        try:
            yield
        finally:
            self._swap()
            sync()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.average.items():
            weights = self.shards[name].tensor.clone()
            self.shards[name].tensor.copy_(value)
            value.copy_(weights)
