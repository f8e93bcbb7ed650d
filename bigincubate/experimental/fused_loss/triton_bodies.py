"""Triton kernels of the fused loss. Imported only on use, because Triton is not available on every platform."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK = 1024


@triton.jit
def _cross_entropy(logits, first, second, share, loss, normalizer, classes, smoothing, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    begin = logits + row.to(tl.int64) * classes
    largest, total, scaled = -float("inf"), 0.0, 0.0
    for start in range(0, classes, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < classes
        x = tl.load(begin + offsets, mask=inside, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, 0))
        scaled = scaled * tl.exp(largest - above) + tl.sum(tl.exp(x - above), 0)
        total += tl.sum(tl.where(inside, x, 0.0), 0)
        largest = above
    norm = largest + tl.log(scaled)
    weight = tl.load(share + row)
    hit = weight * tl.load(begin + tl.load(first + row)).to(tl.float32)
    hit += (1 - weight) * tl.load(begin + tl.load(second + row)).to(tl.float32)
    tl.store(loss + row, norm - (1 - smoothing) * hit - smoothing * (total / classes))
    tl.store(normalizer + row, norm)


def soft_cross_entropy(
    logits: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """See `bigincubate.experimental.fused_loss.operator`."""
    logits = logits.contiguous()
    rows, classes = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normalizer = torch.empty_like(loss)
    wrap_triton(_cross_entropy)[(rows,)](logits, first, second, share, loss, normalizer, classes, smoothing, BLOCK)
    return loss, normalizer


@triton.jit
def _cross_entropy_backward(  # type: ignore[no-untyped-def]
    grad, logits, normalizer, first, second, share, out, classes, smoothing, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < classes
    at = row.to(tl.int64) * classes + offsets
    value = tl.exp(tl.load(logits + at, mask=inside).to(tl.float32) - tl.load(normalizer + row)) - smoothing / classes
    weight = (1 - smoothing) * tl.load(share + row)
    value -= tl.where(offsets == tl.load(first + row), weight, 0.0)
    value -= tl.where(offsets == tl.load(second + row), 1 - smoothing - weight, 0.0)
    tl.store(out + at, (value * tl.load(grad + row)).to(out.dtype.element_ty), mask=inside)


def soft_cross_entropy_backward(
    grad: Tensor, logits: Tensor, normalizer: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float
) -> Tensor:
    """See `bigincubate.experimental.fused_loss.operator`."""
    logits = logits.contiguous()
    rows, classes = logits.shape
    out = torch.empty_like(logits)
    wrap_triton(_cross_entropy_backward)[(rows, triton.cdiv(classes, BLOCK))](
        grad, logits, normalizer, first, second, share, out, classes, smoothing, BLOCK
    )
    return out
