"""Exponential moving average of the trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint.pieces import Piece, PieceReader


class Ema:
    """A moving average of the trainable parameters, of what this rank has of them, in their own dtype and place."""

    def __init__(self, shards: Mapping[str, Piece], decay: float) -> None:
        self.decay = decay
        self.shards = dict(shards) if decay else {}
        self.average = {name: piece.tensor.clone() for name, piece in self.shards.items()}

    @torch.no_grad()
    def update(self) -> None:
        if self.average:
            own = [piece.tensor for piece in self.shards.values()]
            torch._foreach_lerp_(list(self.average.values()), own, 1 - self.decay)

    def save(self) -> dict[str, Piece]:
        return {
            f"ema/{name}": Piece(value, self.shards[name].offset, self.shards[name].shape)
            for name, value in self.average.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(tensors, PieceReader)
        for name, value in self.average.items():
            part = tensors.part(f"ema/{name}", self.shards[name].offset, value.numel())
            value.copy_(part.view(value.shape))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the model's own weights; again to put them back."""
        for name, value in self.average.items():
            own = self.shards[name].tensor.clone()
            self.shards[name].tensor.copy_(value)
            value.copy_(own)
