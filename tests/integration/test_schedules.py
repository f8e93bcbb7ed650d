"""Learning rates over the phases of a run, and what the meta model hands on besides its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError
from bigincubate.storage.artifacts import load_manifest

Harnesses = Callable[..., Any]
PEAK, LOW, WARM = 2e-3, 1e-6, 1e-6
EXPAND = ("plan.incubate=none", "finetune.budget=epochs", "log.every_steps=1")
WSD = ("schedule.name=wsd", "schedule.decay=sqrt", "schedule.decay_share=0.25")


def rates(harness: Any, *phases: str) -> list[float]:
    """The learning rate of each step in the logs of these phases."""
    return [row["train/lr"] for phase in phases for row in harness.log(phase)]


def identity(harness: Any, phase: str) -> dict[str, Any]:
    found: dict[str, Any] = load_manifest(harness.run.phase(phase).artifact).identity
    return found


# ------------------------------------------------------------------------------------------------ over both phases


@pytest.mark.parametrize(
    ("shape", "sets"),
    [
        ("cosine", ()),
        ("wsd", WSD),
        ("wsd in the first phase", ("schedule.name=wsd", "schedule.decay_share=0.8", "schedule.warmup_epochs=0")),
    ],
)
def test_learning_rate_is_one_function_of_the_steps_of_both_phases(
    shape: str, sets: tuple[str, ...], harness: Harnesses
) -> None:
    """The meta model takes 8 steps, and fine-tuning continues for 12; two of 13 steps of an epoch are the warm-up."""
    made = harness(
        *EXPAND,
        "expand.schedule=continue",
        "pretrain.train.max_steps=8",
        "finetune.train.max_steps=12",
        "schedule.warmup_epochs=0.051",
        *sets,
    )
    steps_per_epoch = made.data.samples["train"] // 32
    warmup = 0 if "schedule.warmup_epochs=0" in sets else round(0.051 * steps_per_epoch)
    assert warmup in (0, 2)
    made.train("pretrain")
    made.train("finetune")

    def formula(step: int) -> float:
        if step < warmup:
            return WARM + (PEAK - WARM) * step / warmup
        if shape == "cosine":
            return LOW + (PEAK - LOW) * (1 + math.cos(math.pi * step / 20)) / 2
        if shape == "wsd":
            return LOW + (PEAK - LOW) * (1 - math.sqrt(max(0, step - 15) / 5))
        return LOW + (PEAK - LOW) * min(1, (20 - step) / 16)

    assert rates(made, "pretrain", "finetune") == pytest.approx([formula(step) for step in range(20)], rel=1e-9)


def test_fine_tuning_warms_up_again_or_keeps_the_peak_and_decays_faster(harness: Harnesses) -> None:
    lengths = ("pretrain.train.max_steps=4", "finetune.train.max_steps=6", "pretrain.schedule.name=constant")
    keeps = harness(*EXPAND, *lengths, "finetune.schedule.name=linear")
    keeps.train("pretrain")
    keeps.train("finetune")
    line = [LOW + (PEAK - LOW) * (1 - step / 6) for step in range(6)]
    assert rates(keeps, "pretrain", "finetune") == pytest.approx([PEAK] * 4 + line, rel=1e-9)
    warms = harness(*EXPAND, *lengths, "finetune.schedule.warmup_epochs=0.051")
    assert warms.rows[0].identity == keeps.rows[0].identity
    assert warms.trainer("pretrain").parts.schedule.learning_rate(0) == PEAK


def test_continued_schedule_needs_the_same_settings_in_both_phases(harness: Harnesses) -> None:
    with pytest.raises(ConfigError) as caught:
        harness(*EXPAND, "expand.schedule=continue", "finetune.train.lr=0.5", "pretrain.schedule.name=linear")
    assert str(caught.value) == (
        'expand.schedule = "continue": fine-tuning continues the learning rate of the meta model, but'
        " finetune.train.lr = 0.5 (meta model: 0.002), finetune.schedule.name = 'cosine' (meta model: 'linear');"
        " set the same values in both phases"
    )
    harness("expand.schedule=continue", "finetune.train.lr=0.5")  # of no effect: every module is incubated


def test_identity_of_the_meta_model_has_the_length_of_a_continued_schedule(harness: Harnesses) -> None:
    def meta(*sets: str) -> dict[str, Any]:
        found: dict[str, Any] = harness(*EXPAND, *sets).rows[0].identity
        return found

    cosine = meta("expand.schedule=continue")
    assert cosine == meta() | {"schedule_total": 24}
    assert meta("expand.schedule=continue", "finetune.train.max_steps=9") == meta() | {"schedule_total": 21}
    # the stable part is the same for every length
    stable = meta(*WSD, "expand.schedule=continue")
    assert stable == meta(*WSD, "expand.schedule=continue", "finetune.train.max_steps=90")
    assert stable["schedule_ends"] == "before_decay"
    assert not stable.keys() & {"schedule.decay", "schedule.decay_share", "schedule_total"}


# ------------------------------------------------------------------------------------------------ before the decay


def test_meta_model_is_handed_on_before_its_decay(harness: Harnesses) -> None:
    whole = harness(*EXPAND, *WSD)
    early = harness(*EXPAND, *WSD, "pretrain.handover=before_decay")
    assert [harness.rows[0].steps for harness in (whole, early)] == [12, 9]
    assert early.rows[0].total_flops == whole.rows[0].total_flops * 9 // 12
    for made in (whole, early):
        made.train("pretrain")
    assert rates(early, "pretrain") == [PEAK] * 9 == rates(whole, "pretrain")[:9]
    assert early.log("pretrain")[7]["train/loss"] == whole.log("pretrain")[7]["train/loss"]
    assert identity(early, "pretrain")["schedule_ends"] == "before_decay"
    assert "schedule_ends" not in identity(whole, "pretrain")


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_schedule_without_a_stable_part_cannot_be_left_before_its_decay(shape: str, fast: Path) -> None:
    with pytest.raises(ConfigError, match=rf'needs pretrain.schedule.name = "wsd" \(or .*: {shape} has no stable part'):
        load_recipe(fast, ["pretrain.handover=before_decay", f"schedule.name={shape}"])


def test_decay_cannot_be_both_omitted_and_continued(harness: Harnesses) -> None:
    with pytest.raises(ConfigError, match=r"remove pretrain\.handover"):
        harness(*EXPAND, *WSD, "pretrain.handover=before_decay", "expand.schedule=continue")
