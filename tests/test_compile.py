"""Blocks under torch.compile compute what they compute without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Labs = Callable[..., Any]


@pytest.mark.full
@pytest.mark.parametrize("how", ["none", "every", "selective"])
def test_compiled_blocks_give_the_same_losses(lab: Labs, how: str) -> None:
    sets = ["train.max_steps=4", "log.every_steps=1", "plan.target_depths=[4, 4]", "drop_path.rate=0.3"]
    plain, compiled = lab(*sets), lab(*sets, "train.compile=true", f"sharding.activation_checkpointing={how}")
    for phase, module in [("pretrain", None), ("incubate", 1)]:
        for one in (plain, compiled):
            one.train(phase, module)
        found, expected = compiled.log(phase, module), plain.log(phase, module)
        assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in expected], rel=1e-5)
