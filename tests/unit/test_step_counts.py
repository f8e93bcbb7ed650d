"""The operators of an update: as many for a deep model as for a shallow one; fused ones do not wait for the device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from step_counts import StepCounter
from timm.models.vision_transformer import VisionTransformer

from bigincubate.config import load_recipe
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.optim.ema import Ema
from bigincubate.optim.optimizer import make_optimizer
from bigincubate.sharding.ddp import Replicated


def count_update(name: str, depth: int) -> StepCounter:
    """Count clipping, update, clearing of gradients and moving average in the second step, as on a GPU."""
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, num_heads=2, depth=depth, num_classes=4)
    settings = load_recipe("digits", [f"optim.name={name}"]).settings("pretrain")
    sharding = Replicated(DistributedContext())
    sharding.prepare(model, [], lambda model: make_optimizer(model, settings))
    for group in sharding.optimizer.param_groups:
        group["foreach"] = not group.get("fused")  # the optimizers choose this themselves only on a GPU
    ema = Ema(sharding.local_shards(), 0.9)
    for _ in range(2):
        model(torch.ones(2, 3, 8, 8)).sum().backward()
        with StepCounter() as counter:
            sharding.step(1.0)
            ema.update()
    return counter


@pytest.mark.parametrize("name", ["adamw", "adam", "lamb", "sgd", "momentum", "rmsprop"])
def test_operators_of_an_update_do_not_grow_with_depth(name: str) -> None:
    shallow, deep = count_update(name, 4).operators, count_update(name, 8).operators
    assert shallow == deep
    assert deep.total() < 60
    assert deep["_foreach_norm"] >= 1
    assert deep["_foreach_lerp_"] >= 1


def test_lion_has_one_operator_per_parameter() -> None:
    """timm takes the sign of each update separately."""
    shallow, deep = count_update("lion", 4).operators, count_update("lion", 8).operators
    assert deep - shallow == Counter(sign_=4 * 12)


@pytest.mark.parametrize(("name", "reads"), [("adamw", 0), ("adam", 0), ("lamb", 1), ("sgd", 1)])
def test_only_optimizers_that_are_not_fused_wait_for_the_norm(name: str, reads: int) -> None:
    found = count_update(name, 2).reads
    found.pop("_helpers.py:_get_value", None)  # LAMB's step counters, which are on the host
    assert found == Counter({"base.py:update_weights_unless": reads} if reads else {})


def test_reads_are_counted_by_caller() -> None:
    tensor = torch.ones(3)
    with StepCounter() as counter:
        assert tensor.sum() > 0
        float(tensor[0])
        tensor.nonzero()
        tensor[tensor > 0]
        tensor.cpu()
        tensor.tolist()
    assert counter.reads == Counter({"test_step_counts.py:test_reads_are_counted_by_caller": 6})
