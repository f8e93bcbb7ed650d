"""Cross entropy with targets from mixup: at most two classes per row, and label smoothing.

The dense target ``[rows, classes]`` is never stored, and the logits are read once in the forward pass and once in the
backward pass. A row's target is t = (1 - s) (w [first] + (1 - w) [second]) + s / C, which sums to one, so its cross
entropy is logsumexp(x) - (1 - s) (w x[first] + (1 - w) x[second]) - s mean(x), and the gradient softmax(x) - t.

Source of the targets: Zhang et al., mixup, 2018 (arXiv:1710.09412); Szegedy et al., 2016 (arXiv:1512.00567), section 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.launch import use_triton


def soft_cross_entropy(logits: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float) -> Tensor:
    """Return the cross entropy of each row, ``[rows]``, in fp32 (fp64 for fp64 logits).

    Args:
        logits: ``[rows, classes]`` of any floating-point dtype; the computation is in fp32.
        first: ``[rows]`` int64, one class.
        second: ``[rows]`` int64, the other class; it may be the same.
        share: ``[rows]`` float32 (fp64 with fp64 logits), the weight of ``first``; that of ``second`` is 1 - share.
        smoothing: Fraction of the target that is spread over all classes, in [0, 1).
    """
    loss, _ = _soft_cross_entropy(logits, first, second, share, smoothing)
    return loss


def soft_cross_entropy_loss(logits: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float) -> Tensor:
    """Return the mean of `soft_cross_entropy` over the rows, a scalar."""
    return soft_cross_entropy(logits, first, second, share, smoothing).mean()


@torch.library.triton_op("bigincubate::soft_cross_entropy", mutates_args={})
def _soft_cross_entropy(
    logits: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the losses ``[rows]`` and the logsumexp of each row, which the backward pass needs."""
    if not use_triton(logits):
        return _eager(logits, first, second, share, smoothing)
    from . import triton_bodies

    return triton_bodies.soft_cross_entropy(logits, first, second, share, smoothing)


@torch.library.triton_op("bigincubate::soft_cross_entropy_backward", mutates_args={})
def _soft_cross_entropy_backward(
    grad: Tensor, logits: Tensor, normalizer: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float
) -> Tensor:
    """Return the gradient of the logits, given the gradient of the losses ``[rows]``."""
    if not use_triton(logits):
        return _eager_backward(grad, logits, normalizer, first, second, share, smoothing)
    from . import triton_bodies

    return triton_bodies.soft_cross_entropy_backward(grad, logits, normalizer, first, second, share, smoothing)


def _eager(logits: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    x = _to_compute_dtype(logits)
    normalizer = x.logsumexp(1)
    hit = _class_weights(share).mul(x.gather(1, torch.stack([first, second], 1))).sum(1)
    return normalizer - (1 - smoothing) * hit - smoothing * x.mean(1), normalizer


def _eager_backward(
    grad: Tensor, logits: Tensor, normalizer: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float
) -> Tensor:
    x = _to_compute_dtype(logits)
    out = (x - normalizer[:, None]).exp_().sub_(smoothing / x.shape[1])
    out.scatter_add_(1, torch.stack([first, second], 1), _class_weights(share) * (smoothing - 1))
    return out.mul_(grad[:, None]).to(logits.dtype)


def _to_compute_dtype(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _class_weights(share: Tensor) -> Tensor:
    return torch.stack([share, 1 - share], 1)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    logits, first, second, share, ctx.smoothing = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1], first, second, share)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _soft_cross_entropy_backward(grad.contiguous(), *ctx.saved_tensors, ctx.smoothing), None, None, None, None


_soft_cross_entropy.register_autograd(_backward, setup_context=_setup)
