"""Blocks under torch.compile compute what they compute without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TrainingHarness
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import compile_fx
from torch.fx import GraphModule

from bigincubate.config import load_recipe
from bigincubate.planning.smoke import smoke

Harnesses = Callable[..., Any]


@pytest.mark.full
@pytest.mark.parametrize("how", ["none", "full", "selective"])
def test_compiled_blocks_give_the_same_losses(harness: Harnesses, how: str) -> None:
    sets = ["train.max_steps=4", "log.every_steps=1", "plan.target_depths=[4, 4]", "drop_path.rate=0.3"]
    plain, compiled = harness(*sets), harness(*sets, "train.compile=true", f"sharding.activation_checkpointing={how}")
    for phase, module in [("pretrain", None), ("incubate", 1)]:
        for one in (plain, compiled):
            one.train(phase, module)
        found, expected = compiled.log(phase, module), plain.log(phase, module)
        assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in expected], rel=1e-5)


def test_shipped_recipe_fine_tunes_with_both_kernels_in_its_compiled_graphs(
    tmp_path: Path, counted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are counted where inductor would take them, and go no further than to autograd. Six steps, in each of
    which other branches are dropped and other images mixed."""
    graphs: list[list[str]] = []

    def take(graph: GraphModule, inputs: list[Tensor], **_: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compile_fx, "compile_fx", take)
    torch._dynamo.reset()
    file = tmp_path / "recipe.toml"
    file.write_text(load_recipe("imagenet-vit-b-fused", ["train.precision=fp32"], smoke).toml())
    harness = TrainingHarness(file, tmp_path / "run")
    harness.train("pretrain")
    for module in range(4):
        harness.train("incubate", module)
    graphs.clear()
    torch._dynamo.reset()
    assert harness.train("finetune")["steps"] == 6

    def uses(name: str) -> list[int]:
        return [found for used in graphs if (found := sum(target.startswith(f"bigincubate.{name}") for target in used))]

    assert uses("soft_cross_entropy") == [1]
    assert uses("add_branch") == [2]  # attention's and the MLP's; the last block has no graph
    # for twelve blocks: one kind to score the assembled model, one to train; none anew as other branches are dropped
    assert len(graphs) == 1 + 1 + 1
