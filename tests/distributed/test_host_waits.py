"""How often the host waits for the device in a step that is not logged, counted on two real ranks of the CPU.

Reads of values are counted. ``torch.cuda.synchronize``, which fairscale calls once in each step, cannot be seen on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from launching import launch, words

pytest.importorskip("deepspeed")
pytest.importorskip("fairscale")

Harnesses = Callable[..., Any]
EVERYTHING = ["mixup.mixup=0.4", "mixup.cutmix=1.0", "drop_path.rate=0.3", "augment.erase=0.3", "ema.decay=0.9"]
EVERYTHING += ["train.clip_grad=1.0", "train.micro_batch=8", "log.every_steps=100", "train.max_steps=5"]
# reads of tensors that are on the host: the batch before it is copied to the device, and the step counters of LAMB
ON_THE_HOST = {"batch.py:micro_batch", "_helpers.py:_get_value", "flat_lamb.py:_update"}
SKIP = "base.py:update_weights_unless"  # without a fused optimizer, the host decides whether to skip an update
DEEPSPEED = "utils.py:is_invalid_grad_norm"  # for all gradients; in stages 1 and 2, again for each parameter group
GROUPS = {"adamw": 2, "lamb": 32}  # one with and one without weight decay; with LAMB, one per parameter
EXPECTED: dict[tuple[str, str], dict[str, int]] = {
    ("none", "adamw"): {},
    ("ddp", "adamw"): {},
    ("fsdp2", "adamw"): {},
    ("oss", "adamw"): {},
    ("zero1", "adamw"): {DEEPSPEED: 1 + GROUPS["adamw"]},
    ("zero2", "adamw"): {DEEPSPEED: 1 + GROUPS["adamw"]},
    ("zero3", "adamw"): {DEEPSPEED: 1},
    ("none", "lamb"): {SKIP: 1},
    ("ddp", "lamb"): {SKIP: 1},
    ("fsdp2", "lamb"): {SKIP: 1},
    ("oss", "lamb"): {SKIP: 1},
    ("zero2", "lamb"): {DEEPSPEED: 1 + GROUPS["lamb"]},
    ("zero3", "lamb"): {DEEPSPEED: 1},
}
Reads = dict[tuple[str, str], list[dict[str, int]]]


@pytest.fixture(scope="module")
def reads(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Reads:
    """The values that the host reads in steps 2 and 3 of the meta model, on every rank."""
    folder = tmp_path_factory.mktemp("counts")
    found: Reads = {}
    for world in (1, 2):
        cases = [case for case in EXPECTED if (case[0] == "none") == (world == 1)]
        jobs = []
        for strategy, optimizer in cases:
            sets = [*EVERYTHING, f"sharding.strategy={strategy}", f"optim.name={optimizer}"]
            jobs.append({**words(harness(*sets), "pretrain"), "count_steps": [2, 3]})
        (folder / str(world)).mkdir()
        for case, outcomes in zip(cases, launch(folder / str(world), jobs, world), strict=True):
            assert [outcome["code"] for outcome in outcomes] == [0] * world, outcomes
            found[case] = [step for outcome in outcomes for step in outcome["reads"]]
    return found


@pytest.fixture(scope="module")
def skipped(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of five steps in which the gradient of step 2 is not finite on rank 1."""
    sets = [*EVERYTHING, "log.every_steps=1", "train.max_nonfinite=1"]
    runs = {strategy: harness(*sets, f"sharding.strategy={strategy}") for strategy in ("ddp", "fsdp2", "oss")}
    jobs = [{**words(run, "pretrain"), "spoiled_rank": 1, "poison": [2]} for run in runs.values()]
    for outcomes in launch(tmp_path_factory.mktemp("skipped"), jobs):
        assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
    return runs


@pytest.mark.parametrize("strategy", ["fsdp2", "oss"])
def test_update_that_is_skipped_on_the_device_changes_nothing(skipped: dict[str, Any], strategy: str) -> None:
    """Weights, averages and step counts stay the same, so everything after that step is as under DDP."""
    expected, found = skipped["ddp"].log("pretrain"), skipped[strategy].log("pretrain")
    assert [row["train/skipped"] for row in found] == [0, 0, 1, 1, 1]
    later = [3, 4]
    for key in ("train/loss", "train/grad_norm"):
        assert [found[row][key] for row in later] == pytest.approx([expected[row][key] for row in later], rel=1e-5)
    weights = skipped[strategy].weights("pretrain")
    for name, tensor in skipped["ddp"].weights("pretrain").items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", EXPECTED, ids="-".join)
def test_steps_that_are_not_logged_wait_only_where_documented(reads: Reads, case: tuple[str, str]) -> None:
    """With clipping, micro-batches, mixing, stochastic depth and a moving average."""
    steps = [{site: count for site, count in step.items() if site not in ON_THE_HOST} for step in reads[case]]
    assert steps == [EXPECTED[case]] * (2 if case[0] == "none" else 4)
