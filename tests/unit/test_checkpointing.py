"""Activation checkpointing: the same gradients, less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bigincubate.models.activation_checkpointing import checkpoint_activations

Harnesses = Callable[..., Any]


def kept_and_gradients(trainer: Any, how: str) -> tuple[int, dict[str, Tensor]]:
    """Bytes that a forward keeps for its backward besides parameters, and what the backward gives."""
    model = trainer.model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    units = [block.path for block in trainer.context.partition.blocks()]
    checkpoint_activations(model, units, how)
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).square().sum()
    loss.backward()
    return sum(kept.values()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context")
@pytest.mark.parametrize(("phase", "module"), [("pretrain", None), ("incubate", 1)])
def test_gradients_are_equal_and_less_memory_is_kept(harness: Harnesses, phase: str, module: int | None) -> None:
    one = harness("plan.target_depths=[4, 4]", "plan.meta_depths=[2, 2]", "train.max_steps=1")
    if phase != "pretrain":
        one.train("pretrain")
    sizes = {}
    for how in ("none", "selective", "full"):
        sizes[how], gradients = kept_and_gradients(one.trainer(phase, module), how)
        if how == "none":
            expected = gradients
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], tensor) for name, tensor in expected.items())
    assert sizes["full"] < 0.35 * sizes["none"]
    assert sizes["selective"] < 0.9 * sizes["none"]


def test_parameter_names_are_unchanged(harness: Harnesses) -> None:
    trainer = harness("sharding.activation_checkpointing=full").trainer("pretrain")
    assert set(trainer.model.state_dict()) == set(harness().trainer("pretrain").model.state_dict())
