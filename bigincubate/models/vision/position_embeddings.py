"""Position embeddings of timm models for images of another size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn


def resample_position_embeddings(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resample learned position embeddings to the patch grid of ``model``; all other tensors stay as they are.

    timm's bicubic resampling is used, which leaves the embeddings of class and register tokens unchanged.

    Args:
        tensors: Tensors by name, all or some of a model's.
        model: A model that takes larger or smaller images; it may be on the meta device.
    """
    resampled, own = dict(tensors), model.state_dict()
    before, after = resampled.get("pos_embed"), own.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        grid = cast("list[int]", list(model.patch_embed.grid_size))  # type: ignore[union-attr, arg-type]
        resampled["pos_embed"] = resample_abs_pos_embed(
            before, new_size=grid, num_prefix_tokens=after.shape[1] - math.prod(grid)
        )
    return resampled
