"""The Triton bodies. Imported only where they run: Triton is not everywhere that torch is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK = 1024


@triton.jit
def _add_branch(x, branch, slots, scale, gamma, out, row, channels, HAS_GAMMA: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    sample = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < row
    at = sample.to(tl.int64) * row + offsets
    value = tl.load(x + at, mask=inside)
    slot = tl.load(slots + sample)  # the row of `branch` that belongs to this sample, or -1
    if slot >= 0:
        added = tl.load(branch + slot.to(tl.int64) * row + offsets, mask=inside).to(tl.float32) * tl.load(scale + slot)
        if HAS_GAMMA:
            added *= tl.load(gamma + offsets % channels, mask=inside).to(tl.float32)
        value = (value.to(tl.float32) + added).to(value.dtype)
    tl.store(out + at, value, mask=inside)


def add_branch(x: Tensor, branch: Tensor, kept: Tensor, scale: Tensor, gamma: Tensor | None) -> Tensor:
    """See `bigincubate.kernels.add_branch`."""
    x, branch = x.contiguous(), branch.contiguous()
    out = torch.empty_like(x)
    slots = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    slots = slots.scatter(0, kept, torch.arange(len(kept), device=x.device))
    row = x.numel() // len(x)
    grid = (len(x), triton.cdiv(row, BLOCK))
    wrap_triton(_add_branch)[grid](
        x, branch, slots, scale, x if gamma is None else gamma, out, row, x.shape[-1], gamma is not None, BLOCK
    )
    return out


@triton.jit
def _cross_entropy(logits, first, second, share, loss, normaliser, classes, smoothing, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
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
    tl.store(normaliser + row, norm)


def soft_cross_entropy(
    logits: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """See `bigincubate.kernels.soft_cross_entropy`."""
    logits = logits.contiguous()
    rows, classes = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normaliser = torch.empty_like(loss)
    wrap_triton(_cross_entropy)[(rows,)](logits, first, second, share, loss, normaliser, classes, smoothing, BLOCK)
    return loss, normaliser


@triton.jit
def _cross_entropy_backward(  # type: ignore[no-untyped-def]
    grad, logits, normaliser, first, second, share, out, classes, smoothing, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < classes
    at = row.to(tl.int64) * classes + offsets
    value = tl.exp(tl.load(logits + at, mask=inside).to(tl.float32) - tl.load(normaliser + row)) - smoothing / classes
    weight = (1 - smoothing) * tl.load(share + row)
    value -= tl.where(offsets == tl.load(first + row), weight, 0.0)
    value -= tl.where(offsets == tl.load(second + row), 1 - smoothing - weight, 0.0)
    tl.store(out + at, (value * tl.load(grad + row)).to(out.dtype.element_ty), mask=inside)


def soft_cross_entropy_backward(
    grad: Tensor, logits: Tensor, normaliser: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float
) -> Tensor:
    """See `bigincubate.kernels.soft_targets`."""
    logits = logits.contiguous()
    rows, classes = logits.shape
    out = torch.empty_like(logits)
    wrap_triton(_cross_entropy_backward)[(rows, triton.cdiv(classes, BLOCK))](
        grad, logits, normaliser, first, second, share, out, classes, smoothing, BLOCK
    )
    return out
