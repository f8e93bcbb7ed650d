"""Language models on several ranks compute the same as one process, with windows of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TrainingHarness
from parity import Case, Parity
from token_data import WINDOW, write_recipe, write_windows

pytest.importorskip("deepspeed")
pytest.importorskip("fairscale")

CHECKPOINTING = "sharding.activation_checkpointing"
# fp32: the same numbers are added in another order. bf16: products of other shapes are rounded differently.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
CASES = [
    Case("ddp", "pretrain"),
    Case("ddp", "incubate", precision="bf16"),
    Case("fsdp2", "incubate", more=("sharding.fsdp2.shard_frozen=true",)),
    Case("fsdp2", "finetune", more=(f"{CHECKPOINTING}=full",)),
    Case("fsdp2", "finetune", precision="bf16"),
    Case("oss", "pretrain"),
    Case("zero1", "incubate"),
    Case("zero2", "finetune"),
    Case("zero3", "incubate"),
    Case("zero3", "finetune"),
]


def random_windows(count: int, seed: int) -> list[Any]:
    generator = np.random.RandomState(seed)
    return [generator.randint(97, 123, 2 + index % WINDOW) for index in range(count)]


@pytest.fixture(scope="module")
def parity(counted: None, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    folder = tmp_path_factory.mktemp("language")
    data = write_windows(folder / "data", random_windows(128, 0), random_windows(30, 1))
    recipe = write_recipe(folder, changes=[('source = "made-up-text"', f'path = "{data}"')])
    made = iter(range(len(CASES)))

    def harness(*sets: str) -> TrainingHarness:
        return TrainingHarness(recipe, folder / f"run-{next(made)}", *sets)

    return Parity(harness, folder, CASES, loud=["ema.decay=0.9"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_norms_are_those_of_one_process(parity: Parity, case: Case) -> None:
    parity.check(case, TOLERANCE[case.precision])


@pytest.mark.parametrize("case", [case for case in CASES if case.phase == "finetune"], ids=str)
def test_scores_and_weights_are_those_of_one_process(parity: Parity, case: Case) -> None:
    single, spread = parity.single[case.optimizer, case.precision], parity.spread[case]
    expected, found = (each.run.phase("finetune").result["metrics"] for each in (single, spread))
    assert found == pytest.approx(expected, rel=10 * TOLERANCE[case.precision], abs=1e-6)
    weights, theirs = single.weights("finetune"), spread.weights("finetune")
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=100 * TOLERANCE[case.precision], msg=name)
