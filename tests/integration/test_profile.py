"""``train.profile``: which steps are traced, where the files are, and that results do not change."""

from __future__ import annotations

import gzip
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, words

from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError, Preempted
from bigincubate.training import profiling

Harnesses = Callable[..., Any]
SETS = ("train.max_steps=6", "log.every_steps=2", "checkpoint.every_steps=2")


def traces(one: Any, phase: str = "pretrain", module: int | None = None) -> dict[str, list[str]]:
    """The names of the events of each trace of a phase."""
    folder: Path = one.run.phase(phase, module).path / "profile"
    found = {}
    for file in sorted(folder.iterdir()) if folder.exists() else []:
        with gzip.open(file) as stream:
            found[file.name] = [event["name"] for event in json.load(stream)["traceEvents"] if "name" in event]
    return found


def steps(names: list[str]) -> list[str]:
    return sorted({name for name in names if name.startswith("step ")})


def stop_at(one: Any, step: int) -> None:
    """Train until a stop signal arrives in this step, counted from 1."""
    trainer = one.trainer("pretrain")
    original = trainer.step

    def stopped(batch: Any) -> Any:
        if trainer.state.step == step - 1:
            trainer.stop.signal = signal.SIGTERM
        return original(batch)

    trainer.step = stopped
    with pytest.raises(Preempted):
        trainer.run()


@pytest.fixture(scope="module")
def plain(harness: Harnesses) -> dict[str, torch.Tensor]:
    """The weights without a profile."""
    one = harness(*SETS)
    one.train("pretrain")
    assert traces(one) == {}
    return one.weights("pretrain")


def check_equal(one: Any, plain: dict[str, torch.Tensor]) -> None:
    found = one.weights("pretrain")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_steps_are_traced_and_results_do_not_change(
    harness: Harnesses, plain: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    one = harness(*SETS, "pretrain.train.profile=[2, 4]")
    with caplog.at_level(logging.INFO, "bigincubate"):
        one.train("pretrain")
    check_equal(one, plain)
    ((name, events),) = traces(one).items()
    assert name == "steps-2-4-rank-0.json.gz"
    assert steps(events) == ["step 2", "step 3", "step 4"]
    assert "aten::linear" in events
    assert f"profile of steps 2-4: {one.run.phase('pretrain').path / 'profile' / name}" in caplog.messages
    one.train("incubate", 0)
    assert traces(one, "incubate", 0) == {}


def test_interrupted_phase_writes_what_it_has_and_traces_the_rest_when_it_resumes(
    harness: Harnesses, plain: dict[str, torch.Tensor]
) -> None:
    one = harness(*SETS)
    stop_at(one, 2)
    one = harness(*SETS, "train.profile=[1, 5]", folder=one.run.path)  # steps 3 to 5 are left
    stop_at(one, 4)
    assert {name: steps(events) for name, events in traces(one).items()} == {
        "steps-3-4-rank-0.json.gz": ["step 3", "step 4"]
    }
    one.train("pretrain")
    assert steps(traces(one)["steps-5-5-rank-0.json.gz"]) == ["step 5"]
    check_equal(one, plain)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [("[1, 2]", "these steps are already done"), ("[7, 9]", "the phase has only 6 steps")],
)
def test_log_says_why_no_step_is_profiled(
    chosen: str, says: str, harness: Harnesses, caplog: pytest.LogCaptureFixture
) -> None:
    one = harness(*SETS)
    stop_at(one, 2)
    one = harness(*SETS, f"train.profile={chosen}", folder=one.run.path)
    with caplog.at_level(logging.INFO, "bigincubate"):
        one.train("pretrain")
    assert traces(one) == {}
    assert f"train.profile = {chosen}: not profiled: {says}" in caplog.messages


def test_file_that_cannot_be_written_does_not_end_the_phase(
    harness: Harnesses, plain: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    one = harness(*SETS, "train.profile=[2, 3]")
    folder = one.run.phase("pretrain").path
    folder.mkdir(parents=True)
    (folder / "profile").write_text("in the way")
    one.train("pretrain")
    check_equal(one, plain)
    assert any("cannot write the profile of steps 2-3" in text for text in caplog.messages)


def test_each_rank_writes_a_trace(harness: Harnesses, tmp_path: Path) -> None:
    one = harness(*SETS, "train.profile=[3, 4]")
    (outcomes,) = launch(tmp_path, [words(one, "pretrain")])
    assert [outcome.get("code", 0) for outcome in outcomes] == [0, 0], outcomes
    found = traces(one)
    assert [*found] == ["steps-3-4-rank-0.json.gz", "steps-3-4-rank-1.json.gz"]
    for events in found.values():
        assert steps(events) == ["step 3", "step 4"]
        assert "gloo:all_reduce" in events


def test_memory_is_recorded_on_a_gpu_only(harness: Harnesses, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(profiling, "record_memory_history", unexpected)
    monkeypatch.setattr(profiling, "write_memory_snapshot", unexpected)
    harness(*SETS, "train.profile=[2, 2]").train("pretrain")


@pytest.mark.parametrize("value", ["[3]", "[3, 2]", "[0, 2]", "[1, 2, 3]", "[]", "[1.5, 2]", "3", '"3-4"', "true"])
def test_value_that_is_not_a_range_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("digits", [f"train.profile={value}"])
    assert "train.profile" in str(caught.value)
    assert "\n" not in str(caught.value)
