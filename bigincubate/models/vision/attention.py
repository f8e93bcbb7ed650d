"""Attention implementation of timm models: the fused one, except where it was measured to be slower."""

from __future__ import annotations

import torch
from torch import nn


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> None:
    """Turn torch's fused attention off on a CPU in bf16.

    There, two matrix products and a softmax take a third of its time (197 tokens, forward and backward;
    `benchmarks/attention.py`), at the price of keeping the softmax for the backward.

    Args:
        model: A timm model.
        device: Where it runs.
        precision: ``"fp32"`` or ``"bf16"``.
    """
    if device.type == "cpu" and precision == "bf16":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
