"""Phases that start with the optimizer state of earlier ones on two ranks, which train as one process does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, words

from bigincubate.storage.sharded_tensors import ShardedTensorReader

pytest.importorskip("fairscale")
KEPT = (
    "plan.incubate=none",
    "finetune.budget=epochs",
    "expand.optimizer=kept",
    "expand.init=stack",
    "log.every_steps=1",
)
STRATEGIES = ["ddp", "fsdp2", "oss"]


def read_state(made: Any, phase: str, step: int) -> ShardedTensorReader:
    folder = made.run.phase(phase).checkpoints / f"step-{step:08d}"
    return ShardedTensorReader(folder.glob("rank-*.safetensors"))


def test_ranks_keep_the_state_that_one_process_keeps(harness: Callable[..., Any], tmp_path: Path) -> None:
    lengths = ("pretrain.train.max_steps=5", "finetune.train.max_steps=4", "checkpoint.every_steps=1")
    single = harness(*KEPT, *lengths)
    single.train("pretrain")
    runs = {strategy: single.copy(tmp_path / strategy) for strategy in STRATEGIES}
    single.train("finetune")
    jobs = [words(made, "finetune", None, "--set", f"sharding.strategy={strategy}") for strategy, made in runs.items()]
    outcomes = launch(tmp_path, jobs)
    assert [[outcome["code"] for outcome in each] for each in outcomes] == [[0, 0]] * 3, outcomes
    fresh = harness(*KEPT, *lengths, "expand.optimizer=fresh")
    fresh.train("pretrain")
    fresh.train("finetune")
    losses = {name: [row["train/loss"] for row in made.log("finetune")] for name, made in runs.items()}
    expected = [row["train/loss"] for row in single.log("finetune")]
    assert losses == {strategy: pytest.approx(expected, rel=1e-5) for strategy in STRATEGIES}
    assert [row["train/loss"] for row in fresh.log("finetune")] != pytest.approx(expected, rel=1e-3)
    one = read_state(single, "finetune", 4)
    for made in runs.values():
        folder = made.run.phase("finetune").checkpoints / "step-00000004"
        assert json.loads((folder / "manifest.json").read_text())["world"] == 2
        found = read_state(made, "finetune", 4)
        assert found.keys() == one.keys()
        for name in ("blocks.1.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "head.weight"):
            assert int(found[f"optim/step/{name}"]) == 5 + 4
            torch.testing.assert_close(
                found[f"optim/exp_avg/{name}"], one[f"optim/exp_avg/{name}"], rtol=1e-3, atol=1e-6
            )


def test_module_and_fine_tuning_keep_on_two_ranks_what_they_keep_in_one_process(
    harness: Callable[..., Any], tmp_path: Path
) -> None:
    """With FSDP2, which divides each tensor and its state among the ranks."""
    sets = ("incubate.optimizer=kept", "incubate.init=stack", "train.max_steps=4", "log.every_steps=1")
    single = harness(*sets)
    single.train("pretrain")
    made = single.copy(tmp_path / "fsdp2")
    for phase, module in (("incubate", 0), ("incubate", 1), ("finetune", None)):
        single.train(phase, module)
        (outcomes,) = launch(tmp_path, [words(made, phase, module, "--set", "sharding.strategy=fsdp2")])
        assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
        losses = [[row["train/loss"] for row in run.log(phase, module)] for run in (made, single)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    found, expected = (read_state(run, "finetune", 4) for run in (made, single))
    assert found.keys() == expected.keys()
    assert int(found["optim/step/head.weight"]) == int(found["optim/step/blocks.1.mlp.fc1.weight"]) == 4 + 4 + 4
