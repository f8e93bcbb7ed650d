"""Mimetic initialization of ViTs: attention that resembles that of pretrained models.

Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, ICML 2023 (arXiv 2305.09828): in pretrained ViTs,
the product of the weights of queries and keys resembles the identity, and the product of the weights of values and of
the projection resembles the negative identity. Both products are drawn in this form and factorized. Tokens then attend
to similar tokens, so position embeddings start as sinusoids, which are similar for near positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import Attention, build_sincos2d_pos_embed
from torch import Tensor, nn

from ...errors import ConfigError
from ..partition import Partition

# factors of the random matrix and of the identity: both are the same number in the paper's setting for ViTs
QUERY_KEY = 0.7
VALUE_PROJECTION = 0.4


@torch.no_grad()
def initialize_mimetic(model: nn.Module, partition: Partition) -> None:
    """Initialize all attention layers of the blocks, and the position embeddings of the patches.

    Args:
        model: A timm model built by its family.
        partition: The model's partition.

    Raises:
        ConfigError: The model has no attention layers or position embeddings of the supported kind.
    """
    blocks = [model.get_submodule(block.path) for block in partition.blocks()]
    attentions = [[layer for layer in block.modules() if _is_supported(layer)] for block in blocks]
    positions = getattr(model, "pos_embed", None)
    if not all(attentions) or not isinstance(positions, nn.Parameter):
        raise ConfigError(
            'end_to_end.init = "mimetic" supports only ViT and DeiT models with learned position embeddings and one'
            f' layer for queries, keys and values, not this {type(model).__name__}; choose "plain" or "scaled"'
        )
    channels = positions.shape[-1]
    if channels % 4:
        raise ConfigError(
            f'end_to_end.init = "mimetic": sinusoidal position embeddings need a width divisible by 4, not {channels};'
            ' choose another, or "plain" or "scaled"'
        )
    for layer in (layer for layers in attentions for layer in layers):
        _initialize_attention(layer)
    grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
    prefix_tokens = positions.shape[1] - math.prod(grid)
    positions[:, prefix_tokens:] = build_sincos2d_pos_embed(grid, channels, device=positions.device)


def _is_supported(layer: nn.Module) -> bool:
    """Return whether a layer is attention with one layer for queries, keys and values, of the width of the model."""
    if not isinstance(layer, Attention):
        return False
    channels = layer.qkv.in_features
    return layer.qkv.out_features == 3 * channels and layer.proj.weight.shape == (channels, channels)


def _initialize_attention(layer: Any) -> None:
    """Set the weights of queries, keys, values and of the projection; biases keep their values, which are zero."""
    query, key, value = layer.qkv.weight.chunk(3)
    for head in range(layer.num_heads):
        rows = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        left, right = _draw_factors(query, QUERY_KEY, QUERY_KEY)
        query[rows], key[rows] = left.T[: layer.head_dim], right[: layer.head_dim]
    left, right = _draw_factors(value, VALUE_PROJECTION, -VALUE_PROJECTION)
    value.copy_(left.T)
    layer.proj.weight.copy_(right.T)


def _draw_factors(like: Tensor, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Return two square factors of ``noise * Z + identity * I``, where the elements of Z have the variance 1 / width.

    The first columns of the left factor and the first rows of the right one are the best approximation of that rank.
    Computed in float64, so that the number of threads does not change the bits of weights in float32.
    """
    width, device = like.shape[-1], like.device
    noises = torch.randn(width, width, dtype=torch.float64, device=device) / math.sqrt(width)
    left, scales, right = torch.linalg.svd(noise * noises + identity * torch.eye(width, device=device))
    roots = scales.sqrt()
    return left * roots, roots[:, None] * right
