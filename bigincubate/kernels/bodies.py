"""Triton kernels. Import this module only where they run: Triton is not available on every platform of torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK = 1024


@triton.jit
def _add_branch(x, branch, slots, scale, gamma, out, numel, channels, HAS_GAMMA: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    sample = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    position = sample.to(tl.int64) * numel + offsets
    value = tl.load(x + position, mask=inside)
    slot = tl.load(slots + sample)  # index of this sample in `branch`, or -1
    if slot >= 0:
        added = tl.load(branch + slot.to(tl.int64) * numel + offsets, mask=inside).to(tl.float32)
        added *= tl.load(scale + slot)
        if HAS_GAMMA:
            added *= tl.load(gamma + offsets % channels, mask=inside).to(tl.float32)
        value = (value.to(tl.float32) + added).to(value.dtype)
    tl.store(out + position, value, mask=inside)


def add_branch(x: Tensor, branch: Tensor, kept: Tensor, scale: Tensor, gamma: Tensor | None) -> Tensor:
    """Run the kernel of :func:`bigincubate.kernels.branch.add_branch`."""
    x, branch = x.contiguous(), branch.contiguous()
    out = torch.empty_like(x)
    slots = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    slots = slots.scatter(0, kept, torch.arange(len(kept), device=x.device))
    numel = x.numel() // len(x)
    grid = (len(x), triton.cdiv(numel, BLOCK))
    wrap_triton(_add_branch)[grid](
        x, branch, slots, scale, x if gamma is None else gamma, out, numel, x.shape[-1], gamma is not None, BLOCK
    )
    return out
