"""Triton kernels on a GPU, compiled: at most twice the error of the eager reference against double precision."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_device_augment import arguments as augment_arguments

from bigincubate.experimental.device_augment import operator as augmentation
from bigincubate.experimental.fused_loss import operator as fused_loss
from bigincubate.experimental.fused_loss import soft_cross_entropy
from bigincubate.kernels.branch import _eager as eager_add_branch
from bigincubate.kernels.branch import add_branch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _not_interpreted() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[str]]:
    """Count the calls of a Triton body: each time it is called, or when it is traced, unless torch has the graph."""

    def counted(module: Any, name: str) -> list[str]:
        calls: list[str] = []
        body = getattr(module, name)

        def counting(*given: Any) -> Any:
            calls.append(name)
            return body(*given)

        monkeypatch.setattr(module, name, counting)
        return calls

    return counted


def to_gpu(*values: Any) -> list[Any]:
    return [value.cuda() if isinstance(value, torch.Tensor) else value for value in values]


def called(function: Any, compiled: bool) -> Any:
    if not compiled:
        return function
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True)


def assert_close_to_exact(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == eager.dtype
    error, allowed = ((value.double() - exact).abs().max().item() for value in (found, eager))
    assert error <= 2 * allowed + 1e-6


# five tokens of 300 channels do not fill a block of the kernel; the others are a ViT-B/16's
SMALL, VIT_B = ((6, 5, 300), [4, 1, 3]), ((16, 197, 768), [0, 2, 3, 7, 11, 15])


@pytest.mark.parametrize(
    ("shape", "compiled"),
    [(SMALL, False), (VIT_B, False), (VIT_B, True)],
    ids=["small-called", "vit-b-called", "vit-b-traced"],
)
@pytest.mark.parametrize("with_gamma", [True, False])
@pytest.mark.parametrize(
    ("stream", "dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "bf16-on-fp32", "bf16"],
)
def test_add_branch_matches_eager(
    stream: torch.dtype,
    dtype: torch.dtype,
    with_gamma: bool,
    shape: tuple[tuple[int, ...], list[int]],
    compiled: bool,
    count_calls: Callable[[Any, str], list[str]],
) -> None:
    from bigincubate.kernels import bodies

    torch.manual_seed(0)
    size, rows = shape
    x, gamma = torch.randn(size).to(stream), torch.randn(size[-1])
    branch, kept = torch.randn(len(rows), *size[1:]).to(dtype), torch.tensor(rows)
    scale = torch.rand(len(rows)).mul_(2)
    given = to_gpu(x, branch, kept, scale, gamma if with_gamma else None)
    double = [value.double() if i in (0, 1, 3, 4) and value is not None else value for i, value in enumerate(given)]
    calls = count_calls(bodies, "add_branch")
    for learned in (given, double):
        for index in (0, 1):
            learned[index].requires_grad_()
    found = called(add_branch, compiled)(*given)
    assert compiled or calls
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, given[:2], grad)
    eager = eager_add_branch(*given)
    eager_gradients = torch.autograd.grad(eager, given[:2], grad)
    exact = eager_add_branch(*double)
    exact_gradients = torch.autograd.grad(exact, double[:2], grad.double())
    with torch.no_grad():
        assert_close_to_exact(found, eager, exact)
        for each in zip(gradients, eager_gradients, exact_gradients, strict=True):
            assert_close_to_exact(*each)


@pytest.mark.parametrize(("classes", "compiled"), [(1000, False), (2500, False), (21841, False), (2500, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_soft_cross_entropy_matches_eager(
    dtype: torch.dtype, classes: int, compiled: bool, count_calls: Callable[[Any, str], list[str]]
) -> None:
    from bigincubate.experimental.fused_loss import triton_bodies

    torch.manual_seed(0)
    logits = (5 * torch.randn(3, classes)).to(dtype)
    first, second = torch.tensor([0, 500, classes - 1]), torch.tensor([7, 500, 3])
    share = torch.tensor([0.3, 0.6, 1.0])
    logits, first, second, share, grad = to_gpu(logits, first, second, share, torch.tensor([1.0, -2.0, 0.5]))
    logits.requires_grad_()
    plain, double = logits.detach(), logits.detach().double()
    exact = fused_loss._eager(double, first, second, share.double(), 0.1)
    eager = fused_loss._eager(plain, first, second, share, 0.1)
    calls = [count_calls(triton_bodies, f"soft_cross_entropy{name}") for name in ("", "_backward")]
    found = called(soft_cross_entropy, compiled)(logits, first, second, share, 0.1)
    found.backward(grad)
    assert compiled or all(calls)
    assert_close_to_exact(found.detach(), eager[0], exact[0])
    slope = fused_loss._eager_backward(grad.double(), double, exact[1], first, second, share.double(), 0.1)
    eager_slope = fused_loss._eager_backward(grad, plain, eager[1], first, second, share, 0.1)
    assert logits.grad is not None
    assert_close_to_exact(logits.grad, eager_slope, slope)


@pytest.mark.parametrize("compiled", [False, True], ids=["called", "traced"])
@pytest.mark.parametrize(
    "off", [(), ("noise",), ("mixing",), ("three_augment", "jitter")], ids=["all", "no-erase", "no-mix", "crop"]
)
def test_device_augment_matches_eager(
    off: tuple[str, ...], compiled: bool, count_calls: Callable[[Any, str], list[str]]
) -> None:
    from bigincubate.experimental.device_augment import triton_bodies

    images, parameters, noise, mixing, *options, _, _, _ = augment_arguments()
    images, parameters, noise, mixing = to_gpu(images, parameters, noise, mixing)
    given = [None if "noise" in off else noise, None if "mixing" in off else mixing, *options, True]
    given += ["three_augment" not in off, "jitter" not in off]
    calls = count_calls(triton_bodies, "augment")
    found = called(augmentation.augment, compiled)(images, parameters, *given)
    assert compiled or calls
    eager = augmentation._eager(images, parameters, *given)
    assert_close_to_exact(found, eager, augmentation._eager(images, parameters.double(), *given))
