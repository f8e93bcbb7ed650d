"""Hybrids that use the stem and the tail of the meta model: `incubate.boundary = "meta"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bigincubate.training.builder import build_model

Harnesses = Callable[..., Any]
BOUNDARY = ("patch_embed.proj.weight", "cls_token", "pos_embed", "norm.weight", "head.weight", "head.bias")


def test_boundary_of_the_meta_model_stays_frozen_up_to_the_assembly(harness: Harnesses) -> None:
    made = harness("train.max_steps=3", "incubate.boundary=meta", "incubate.init=fresh")
    made.train("pretrain")
    meta = made.weights("pretrain")
    last = len(made.context("finetune").plan.target) - 1
    for module in range(last + 1):
        model, _ = build_model(made.context("incubate", module))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert trained.isdisjoint(BOUNDARY)
        assert all(torch.equal(model.state_dict()[name], meta[name]) for name in BOUNDARY)
        made.train("incubate", module)
    assembled, _ = build_model(made.context("finetune"))
    assert all(torch.equal(assembled.state_dict()[name], meta[name]) for name in BOUNDARY)
    assert all(parameter.requires_grad for parameter in assembled.parameters())


def test_frozen_boundary_costs_no_weight_gradients(harness: Harnesses) -> None:
    own, frozen = (
        {row.key: row.cost for row in harness("train.max_steps=3", f"incubate.boundary={boundary}").rows}
        for boundary in ("own", "meta")
    )
    assert frozen["pretrain"] == own["pretrain"]
    assert frozen["finetune"] == own["finetune"]
    for key in ("incubate/0", "incubate/1"):
        assert frozen[key].trainable < own[key].trainable
        assert frozen[key].training_flops < own[key].training_flops
        assert frozen[key].forward_flops == own[key].forward_flops
