"""Triton kernels on a GPU: at most twice the error of the eager reference against double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_device_augment import arguments as augment_arguments

from bigincubate.experimental.device_augment import operator as augmentation
from bigincubate.experimental.fused_loss import operator as fused_loss
from bigincubate.experimental.fused_loss import soft_cross_entropy
from bigincubate.kernels import add_branch
from bigincubate.kernels.branch import _eager as eager_add_branch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def to_gpu(*values: Any) -> list[Any]:
    return [value.cuda() if isinstance(value, torch.Tensor) else value for value in values]


def assert_close_to_exact(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    error, allowed = ((value.double() - exact).abs().max().item() for value in (found, eager))
    assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gamma", [True, False])
def test_add_branch_matches_eager(dtype: torch.dtype, with_gamma: bool) -> None:
    torch.manual_seed(0)
    x, branch, gamma = torch.randn(6, 5, 300).to(dtype), torch.randn(3, 5, 300).to(dtype), torch.randn(300)
    kept, scale = torch.tensor([4, 1, 3]), torch.tensor([2.0, 0.0, 1.5])
    given = to_gpu(x, branch, kept, scale, gamma if with_gamma else None)
    double = [value.double() if i in (0, 1, 3, 4) and value is not None else value for i, value in enumerate(given)]
    assert_close_to_exact(add_branch(*given), eager_add_branch(*given), eager_add_branch(*double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cross_entropy_matches_eager(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 2500)).to(dtype)
    first, second, share = torch.tensor([0, 1500, 2499]), torch.tensor([7, 1500, 3]), torch.tensor([0.3, 0.6, 1.0])
    logits, first, second, share, grad = to_gpu(logits, first, second, share, torch.tensor([1.0, -2.0, 0.5]))
    logits.requires_grad_()
    plain, double = logits.detach(), logits.detach().double()
    exact = fused_loss._eager(double, first, second, share.double(), 0.1)
    eager = fused_loss._eager(plain, first, second, share, 0.1)
    found = soft_cross_entropy(logits, first, second, share, 0.1)
    found.backward(grad)
    assert_close_to_exact(found, eager[0], exact[0])
    slope = fused_loss._eager_backward(grad.double(), double, exact[1], first, second, share.double(), 0.1)
    eager_slope = fused_loss._eager_backward(grad, plain, eager[1], first, second, share, 0.1)
    assert logits.grad is not None
    assert_close_to_exact(logits.grad, eager_slope, slope)


def test_device_augment_matches_eager() -> None:
    images, parameters, noise, mixing, *options, _, _, _ = augment_arguments()
    images, parameters, noise, mixing = to_gpu(images, parameters, noise, mixing)
    given = [noise, mixing, *options, True, True, True]
    found, eager = (function(images, parameters, *given) for function in (augmentation.augment, augmentation._eager))
    assert_close_to_exact(found, eager, augmentation._eager(images, parameters.double(), *given))
