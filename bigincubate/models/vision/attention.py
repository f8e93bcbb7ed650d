"""Which attention: one kernel for all, but where it was measured to be the slower one."""

from __future__ import annotations

import torch
from torch import nn


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> None:
    """torch's fused attention, but on a CPU in bf16: there two products and a softmax take a third of its time (with
    197 tokens, forwards and backwards; `benchmarks/attention.py`), for the price of keeping the softmax."""
    if device.type == "cpu" and precision == "bf16":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
