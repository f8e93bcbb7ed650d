"""The end of a residual branch that was computed for a part of the batch: LayerScale, drop-path's scale and the
scatter-add onto the residual stream, in one pass over memory.

Source: stochastic depth on a subset of the batch, Oquab et al., DINOv2, 2023 (arXiv:2304.07193), section 5; here the
subset is exactly what drop-path keeps, so nothing but rounding differs from computing all and multiplying by zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import on_triton


@torch.library.triton_op("bigincubate::add_branch", mutates_args={})
def add_branch(x: Tensor, branch: Tensor, kept: Tensor, scale: Tensor, gamma: Tensor | None) -> Tensor:
    """``x`` with ``branch * gamma * scale`` added to its rows ``kept``; the other rows as they are.

    Args:
        x: ``[batch, ..., channels]``, the residual stream.
        branch: ``[kept, ..., channels]``, of the same or a narrower dtype.
        kept: ``[kept]`` int64, distinct rows of ``x``.
        scale: ``[kept]`` float32.
        gamma: ``[channels]`` of LayerScale; None: ones.

    Returns:
        A new tensor like ``x``.
    """
    if not on_triton(x):
        return _eager(x, branch, kept, scale, gamma)
    from . import bodies

    return bodies.add_branch(x, branch, kept, scale, gamma)


def _eager(x: Tensor, branch: Tensor, kept: Tensor, scale: Tensor, gamma: Tensor | None) -> Tensor:
    scaled = branch.to(x.dtype) * _rows(scale, branch).to(x.dtype)
    return x.index_add(0, kept, scaled if gamma is None else scaled * gamma.to(x.dtype))


def _rows(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.dim() - 1))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    _, branch, kept, scale, gamma = inputs
    ctx.dtype = branch.dtype
    # the branch is kept where LayerScale learns, and nowhere else
    ctx.save_for_backward(branch if ctx.needs_input_grad[4] else None, kept, scale, gamma)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor | None]:
    branch, kept, scale, gamma = ctx.saved_tensors
    rows = grad.index_select(0, kept) * _rows(scale, grad).to(grad.dtype)
    of_gamma = None
    if branch is not None:
        of_gamma = (rows * branch.to(rows.dtype)).flatten(0, -2).sum(0).to(gamma.dtype)
    of_branch = rows if gamma is None else rows * gamma.to(rows.dtype)
    return grad, of_branch.to(ctx.dtype), None, None, of_gamma


add_branch.register_autograd(_backward, setup_context=_setup)
