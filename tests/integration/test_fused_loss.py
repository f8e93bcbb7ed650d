"""Cross entropy with mixup's targets as two classes and a share: that of the dense targets, which are never made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import run_interpreted

from bigincubate.config import MixupConfig, load_recipe
from bigincubate.errors import ConfigError
from bigincubate.experimental.fused_loss import soft_cross_entropy
from bigincubate.experimental.fused_loss.operator import _soft_cross_entropy
from bigincubate.tasks.image_classification.mixup import TwoHot, blend

Harnesses = Callable[..., Any]
CLASSES, SMOOTHING = 11, 0.1
FUSED = "bigincubate.experimental.fused_loss:soft_cross_entropy_loss"


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, CLASSES, dtype=torch.float64, generator=generator)
    first, second = torch.tensor([0, 3, 10, 7, 7]), torch.tensor([4, 3, 0, 7, 1])  # some are twice the same class
    share = torch.tensor([0.3, 0.9, 1.0, 0.0, 0.5], dtype=torch.float64)
    return logits.to(dtype), first, second, share.to(dtype if dtype == torch.float64 else torch.float32)


def expected(logits: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """With the targets written down, in double precision."""
    hot = share[:, None] * F.one_hot(first, CLASSES) + (1 - share[:, None]) * F.one_hot(second, CLASSES)
    targets = (1 - SMOOTHING) * hot.double() + SMOOTHING / CLASSES
    return -(targets * logits.double().log_softmax(1)).sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_cross_entropy_of_the_dense_targets(dtype: torch.dtype) -> None:
    given = arguments(dtype)
    found = soft_cross_entropy(*given, SMOOTHING)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected(*given), rtol=close, atol=close)


def test_gradient_equals_finite_differences() -> None:
    logits, first, second, share = arguments()
    assert torch.autograd.gradcheck(
        lambda x: soft_cross_entropy(x, first, second, share, SMOOTHING), logits.requires_grad_()
    )


def test_operator_passes_opcheck() -> None:
    logits, *rest = arguments(torch.float32)
    torch.library.opcheck(_soft_cross_entropy, (logits.requires_grad_(), *rest, SMOOTHING))


def test_operator_is_one_node_of_the_compiled_graph() -> None:
    head = torch.nn.Linear(6, CLASSES)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(x: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
        return soft_cross_entropy(head(x), first, second, share, SMOOTHING).mean()

    _, first, second, share = arguments(torch.float32)
    for factor in (1.0, 0.5, 0.25):
        loss(torch.randn(5, 6), first, second, share * factor).backward()
    assert counter.frame_count == 1
    used = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum(target.startswith("bigincubate.soft_cross_entropy") for target in used) == 1


class Shapes(TorchDispatchMode):
    """Counts results of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operator(*arguments, **(options or {}))
        self.count += isinstance(result, Tensor) and tuple(result.shape) == self.shape
        return result


def test_targets_are_never_materialized() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([1, 0, 2, 2])
    with Shapes((4, CLASSES)) as seen:
        _, targets = blend(images, labels, mixup=MixupConfig(mixup=0.8), seed=0, step=0)
        assert seen.count == 0
        targets.dense(CLASSES, SMOOTHING)
        assert seen.count > 0


def test_pairs_and_dense_targets_are_the_same_loss() -> None:
    targets = TwoHot(torch.tensor([1, 0, 2, 2]), torch.tensor([3, 0, 1, 5]), 0.3)
    logits = torch.randn(4, CLASSES)
    dense = F.cross_entropy(logits, targets.dense(CLASSES, SMOOTHING))
    pairs = soft_cross_entropy(logits, targets.labels, targets.partners, torch.full((4,), 0.3), SMOOTHING).mean()
    torch.testing.assert_close(pairs, dense)


BODIES = """
import torch
from bigincubate.experimental.fused_loss import operator, soft_cross_entropy, triton_bodies

calls = []
for name in ("soft_cross_entropy", "soft_cross_entropy_backward"):
    body = getattr(triton_bodies, name)
    setattr(triton_bodies, name, lambda *given, body=body: calls.append(1) or body(*given))
torch.manual_seed(0)
first, second, share = torch.tensor([0, 1500, 2499]), torch.tensor([7, 1500, 3]), torch.tensor([0.3, 0.6, 1.0])
for dtype in (torch.float32, torch.bfloat16):
    logits = (5 * torch.randn(3, 2500)).to(dtype).requires_grad_()
    grad = torch.tensor([1.0, -2.0, 0.5])
    exact = operator._eager(logits.detach().double(), first, second, share.double(), 0.1)
    slope = operator._eager_backward(
        grad.double(), logits.detach().double(), exact[1], first, second, share.double(), 0.1
    )
    eager = operator._eager(logits.detach(), first, second, share, 0.1)
    eager_slope = operator._eager_backward(grad, logits.detach(), eager[1], first, second, share, 0.1)
    loss = soft_cross_entropy(logits, first, second, share, 0.1)
    loss.backward(grad)
    for found, other, true in ((loss, eager[0], exact[0]), (logits.grad, eager_slope, slope)):
        error, allowed = (found.double() - true).abs().max().item(), (other.double() - true).abs().max().item()
        assert error <= 2 * allowed + 1e-12, (dtype, error, allowed)
print(len(calls), "bodies ran")
"""


def test_triton_errors_are_at_most_twice_those_of_eager() -> None:
    assert run_interpreted(BODIES) == "4 bodies ran"


def test_training_with_it_gives_the_same_losses(harness: Harnesses) -> None:
    sets = ["train.max_steps=4", "log.every_steps=1", "mixup.mixup=0.8", "loss.label_smoothing=0.1"]
    plain, fused = harness(*sets), harness(*sets, f"loss.name={FUSED}")
    for one in (plain, fused):
        one.train("pretrain")
    found, wanted = ([row["train/loss"] for row in one.log("pretrain")] for one in (fused, plain))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert fused.recipe.identity != plain.recipe.identity  # equal up to rounding only


@pytest.mark.parametrize(
    ("name", "problem"),
    [("no_such:loss", "cannot import no_such"), ("torch.nn.functional:entropy", "has no attribute 'entropy'")],
)
def test_loss_name_that_cannot_be_loaded_is_refused(harness: Harnesses, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"loss.name = '{name}': .*{problem}"):
        harness(f"loss.name={name}").trainer("pretrain")


def test_loss_name_unknown_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"loss.name: expected cross_entropy or bce or package.module:attribute"):
        load_recipe("digits", ["loss.name=focal"])
