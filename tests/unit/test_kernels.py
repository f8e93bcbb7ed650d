"""Each operator: its Triton body, under Triton's interpreter, and its gradients, against double precision."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import run_interpreted

from bigincubate.kernels.branch import add_branch

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def arguments(dtype: torch.dtype = torch.float64, *, gamma: bool = True) -> Arguments:
    torch.manual_seed(0)
    x, branch = torch.randn(5, 3, 4, dtype=dtype), torch.randn(3, 3, 4, dtype=dtype)
    scale = torch.tensor([2.0, 0.0, 2.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, branch, torch.tensor([3, 0, 1]), scale, torch.randn(4, dtype=dtype) if gamma else None


def expected(
    x: torch.Tensor, branch: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor, gamma: torch.Tensor | None
) -> torch.Tensor:
    """Row by row, in double precision."""
    out = x.double().clone()
    for row, index in enumerate(kept.tolist()):
        out[index] += branch[row].double() * (1 if gamma is None else gamma.double()) * scale[row].double()
    return out


@pytest.mark.parametrize("gamma", [True, False])
def test_branch_is_added_to_the_rows_it_was_computed_for(gamma: bool) -> None:
    given = arguments(torch.float32, gamma=gamma)
    torch.testing.assert_close(add_branch(*given).double(), expected(*given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [True, False])
def test_gradients_equal_finite_differences(gamma: bool) -> None:
    x, branch, kept, scale, factor = arguments(gamma=gamma)
    learned = [tensor.requires_grad_() for tensor in (x, branch, factor) if tensor is not None]

    def act(*given: torch.Tensor) -> torch.Tensor:
        return add_branch(given[0], given[1], kept, scale, given[2] if gamma else None)

    assert torch.autograd.gradcheck(act, learned)


def test_operator_passes_opcheck() -> None:
    """Schema, fake tensors, autograd and dynamic shapes, as torch checks them."""
    x, branch, kept, scale, gamma = arguments(torch.float32)
    assert gamma is not None
    given = x.requires_grad_(), branch.requires_grad_(), kept, scale, gamma.requires_grad_()
    torch.library.opcheck(add_branch, given)


def test_bf16_branch_on_a_fp32_stream_gives_fp32() -> None:
    x, branch, kept, scale, gamma = arguments(torch.float32)
    found = add_branch(x, branch.bfloat16(), kept, scale, gamma)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(x, branch.bfloat16(), kept, scale, gamma), rtol=1e-6, atol=1e-6)


BODIES = """
import torch
from bigincubate.kernels import bodies
from bigincubate.kernels.branch import _eager, add_branch

torch.manual_seed(0)
calls, body = [], bodies.add_branch
bodies.add_branch = lambda *given: calls.append(1) or body(*given)
single, half = torch.float32, torch.bfloat16
for stream, narrow in [(single, single), (single, half), (half, half)]:
    for gamma in (None, torch.randn(300)):
        x, branch = torch.randn(6, 5, 300).to(stream), torch.randn(3, 5, 300).to(narrow)
        kept, scale = torch.tensor([4, 1, 3]), torch.tensor([2.0, 0.0, 1.5])
        added = branch.double() * scale.double().view(-1, 1, 1) * (1 if gamma is None else gamma.double())
        exact = x.double().index_add(0, kept, added)
        size = x.double().abs().index_add(0, kept, added.abs())  # of what is added, before anything cancels
        for compute in (add_branch, _eager):
            error = ((compute(x, branch, kept, scale, gamma).double() - exact).abs() / size).max().item()
            assert error <= 2 * torch.finfo(stream).eps, (compute, stream, narrow, error)
print(len(calls), "bodies ran")
"""


def test_errors_of_triton_and_eager_are_at_most_two_roundings() -> None:
    assert run_interpreted(BODIES) == "6 bodies ran"
