"""Activation checkpointing: the backward pass recomputes the activations of blocks instead of storing them.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016 (arXiv:1604.06174). Blocks draw no random
numbers (see `drop_path`), so the recomputed activations are bitwise identical.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
# expensive operators whose results "selective" keeps; norms, activation functions and scaling are recomputed
KEPT_OPERATORS = [
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
    """Recompute the activations of the blocks at these paths in the backward pass. Parameter names do not change.

    Args:
        model: The model.
        blocks: Paths of the blocks.
        how: ``"full"``: all activations are recomputed. ``"selective"``: the results of matrix products, convolutions
            and attention are kept. ``"none"``: nothing changes.
    """
    if how == "none":
        return
    options = {}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT_OPERATORS)
    for path in blocks:
        block = model.get_submodule(path)
        # replace the method, not the module, so that the hooks of a sharding strategy run only once
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
