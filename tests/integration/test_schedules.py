"""Learning rates over the phases of a run, and what the meta model hands on besides its weights."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigincubate import api
from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError
from bigincubate.planning.context import open_run
from bigincubate.report.verify import Verdict, verify_run
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


# ------------------------------------------------------------------------------------------------ forks


def fork(made: Any, harness: Harnesses, folder: Path, *sets: str) -> tuple[Any, list[tuple[bool, str]]]:
    """Fork a run with other settings; return the new run, and what became of the phases."""
    forked = api.fork(made.run.path, folder, load_recipe(made.run.recipe_file, sets))
    other = copy.copy(made)
    opened = open_run(forked.run.load_recipe(), forked.run)
    other.run, other.recipe, other.rows = forked.run, opened.recipe, opened.rows
    return other, [(phase.taken, phase.reason) for phase in forked.phases]


def same(first: Any, second: Any, phase: str = "pretrain") -> bool:
    one, two = first.weights(phase), second.weights(phase)
    return all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


@pytest.fixture(scope="module")
def decayed(harness: Harnesses) -> Any:
    """Twelve steps, of which the last three decay; checkpoints of steps 8, 9 (the end of the stable part) and 12."""
    made = harness(*EXPAND, *WSD, "checkpoint.every_steps=2")
    made.train("pretrain")
    return made


@pytest.mark.parametrize(
    "sets",
    [
        ("pretrain.handover=before_decay",),
        ("schedule.decay=linear",),
        ("pretrain.train.max_steps=20", "schedule.min_lr=0.0"),
        ("schedule.decay_share=0.0",),
        ("expand.schedule=continue",),
    ],
)
def test_forks_share_the_steps_before_the_decay(
    sets: tuple[str, ...], decayed: Any, harness: Harnesses, tmp_path: Path
) -> None:
    steps = sorted(path.name for path in decayed.run.phase("pretrain").checkpoints.iterdir())
    assert steps == ["step-00000009", "step-00000010", "step-00000012"]
    forked, phases = fork(decayed, harness, tmp_path / "fork", *sets)
    assert phases[0] == (True, "unfinished, from step 9")
    forked.train("pretrain")
    whole = harness(*EXPAND, *WSD, "checkpoint.every_steps=2", *sets)
    whole.train("pretrain")
    assert same(forked, whole)
    assert rates(forked, "pretrain") == rates(whole, "pretrain")
    assert not same(forked, decayed)
    found = [finding for finding in verify_run(forked.run) if finding.part == "pretrain"]
    assert {finding.verdict for finding in found} == {Verdict.GOOD}, found


def test_decay_is_trained_in_a_fork_of_a_run_that_stopped_before_it(
    decayed: Any, harness: Harnesses, tmp_path: Path
) -> None:
    early = harness(*EXPAND, *WSD, "checkpoint.every_steps=2", "pretrain.handover=before_decay")
    early.train("pretrain")
    late, phases = fork(early, harness, tmp_path / "late", "pretrain.handover=end")
    assert phases[0] == (True, "unfinished, from step 9")
    late.train("pretrain")
    assert same(late, decayed)
    # the stable part alone is finished, whatever the decay would have been
    _, phases = fork(early, harness, tmp_path / "other", "schedule.decay=linear")
    assert phases[0] == (True, "finished")


def test_run_that_stopped_in_its_decay_is_forked_from_before_it(
    decayed: Any, harness: Harnesses, tmp_path: Path
) -> None:
    stopped = decayed.copy(tmp_path / "stopped")
    folder = stopped.run.phase("pretrain")
    (folder.path / "DONE").unlink()
    shutil.rmtree(folder.checkpoints / "step-00000012")
    _, phases = fork(stopped, harness, tmp_path / "same", "finetune.train.lr=0.5")
    assert phases[0] == (True, "unfinished, from step 10")
    forked, phases = fork(stopped, harness, tmp_path / "other", "schedule.decay=linear")
    assert phases[0] == (True, "unfinished, from step 9")
    forked.train("pretrain")


@pytest.mark.parametrize("sets", [("train.lr=0.5",), ("schedule.warmup_epochs=0.1",), ("schedule.decay_share=0.5",)])
def test_what_changes_the_stable_part_is_trained_again(
    sets: tuple[str, ...], decayed: Any, harness: Harnesses, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no phase of"):
        fork(decayed, harness, tmp_path / "fork", *sets)
