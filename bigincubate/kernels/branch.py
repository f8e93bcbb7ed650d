"""Add a residual branch that was computed for a subset of the batch, in one pass over memory.

Combines LayerScale, the scale of drop-path and the scatter-add onto the residual stream.

Source: stochastic depth on a subset of the batch, Oquab et al., DINOv2, 2023 (arXiv:2304.07193), section 5. Here the
subset is exactly the samples that drop-path keeps, so the result differs from that of masking only by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import use_triton


@torch.library.triton_op("bigincubate::add_branch", mutates_args={})
def add_branch(x: Tensor, branch: Tensor, kept: Tensor, scale: Tensor, gamma: Tensor | None) -> Tensor:
    """Return ``x`` with ``branch * gamma * scale`` added to the samples ``kept``.

    Args:
        x: The residual stream, ``[batch, ..., channels]``.
        branch: The branch's output for the kept samples, ``[kept, ..., channels]``, in the dtype of ``x`` or a narrower
            one.
        kept: Distinct indices of the kept samples in the batch, ``[kept]``, int64.
        scale: Drop-path's scale of each kept sample, ``[kept]``, float32.
        gamma: LayerScale's weight, ``[channels]``; None for ones.

    Returns:
        A new tensor of the shape and dtype of ``x``.
    """
    if not use_triton(x):
        return _eager(x, branch, kept, scale, gamma)
    from . import bodies

    return bodies.add_branch(x, branch, kept, scale, gamma)


def _eager(x: Tensor, branch: Tensor, kept: Tensor, scale: Tensor, gamma: Tensor | None) -> Tensor:
    scaled = branch.to(x.dtype) * _broadcastable(scale, branch).to(x.dtype)
    return x.index_add(0, kept, scaled if gamma is None else scaled * gamma.to(x.dtype))


def _broadcastable(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.dim() - 1))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    _, branch, kept, scale, gamma = inputs
    ctx.dtype = branch.dtype
    # only the gradient of LayerScale's weight needs the branch
    ctx.save_for_backward(branch if ctx.needs_input_grad[4] else None, kept, scale, gamma)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor | None]:
    branch, kept, scale, gamma = ctx.saved_tensors
    scaled = grad.index_select(0, kept) * _broadcastable(scale, grad).to(grad.dtype)
    grad_gamma = None
    if branch is not None:
        grad_gamma = (scaled * branch.to(scaled.dtype)).flatten(0, -2).sum(0).to(gamma.dtype)
    grad_branch = scaled if gamma is None else scaled * gamma.to(scaled.dtype)
    return grad, grad_branch.to(ctx.dtype), None, None, grad_gamma


add_branch.register_autograd(_backward, setup_context=_setup)
