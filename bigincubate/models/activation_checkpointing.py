"""Activation checkpointing: what a block computes in the forward is computed again in the backward, not kept.

Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016 (arXiv:1604.06174). Nothing random lives in a block
(:mod:`.drop_path`), so both times give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
# `selective` keeps what is dear to compute and recomputes the rest: norms, activations, scaling
KEPT = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_activations(model: nn.Module, blocks: Iterable[str], how: str) -> None:
    """Make the blocks at these paths recompute activations: ``"full"`` all of them, or ``"selective"``, which keeps
    the results of matrix products and attention. ``"none"`` changes nothing. Names of parameters stay as they are."""
    if how == "none":
        return
    options = {}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    for path in blocks:
        block = model.get_submodule(path)
        # the method is replaced, not the module: hooks of a strategy stay outside of what is computed twice
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
