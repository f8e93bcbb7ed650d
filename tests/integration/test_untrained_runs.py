"""A run directory in which nothing has been trained takes any recipe; one with trained phases keeps them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from denied import deny
from records import make_attempt

from bigincubate.config import load_recipe
from bigincubate.data.prepare import prepare_dataset
from bigincubate.errors import ConfigError
from bigincubate.planning import prepare_run
from bigincubate.planning.context import open_run
from bigincubate.planning.smoke import smoke as smoke_tables
from bigincubate.storage.lease import acquire_lease, acquire_lease_when_free
from bigincubate.storage.run_directory import RunDir

Harnesses = Callable[..., Any]
Called = Callable[..., tuple[int, str, str]]
TWO_STEPS = ("--set", "train.max_steps=2")


def train(recipe: Path, folder: Path, *sets: str) -> list[object]:
    words: list[object] = ["train", recipe, "--run-dir", folder, "--phase", "pretrain", *TWO_STEPS]
    return [*words, *(word for item in sets for word in ("--set", item))]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize(
    ("mistake", "code", "key"),
    [
        ("model.num_classes=11", 2, "model.num_classes: 11 -> 10"),  # found when the data is opened
        ("model.name=vit_tiny_patch16_225", 2, "model.name"),  # found when the plan is made
        ("train.micro_batch=3", 2, "train.micro_batch: 3 -> null"),  # found by the attempt to train the phase
        ("data.path=/nowhere", 3, "data.path"),
        ("data.train_samples=5", 2, "data.train_samples"),
    ],
)
def test_corrected_recipe_takes_a_directory_without_trained_phases(
    counted: None, fast: Path, tmp_path: Path, call: Called, mistake: str, code: int, key: str
) -> None:
    folder = tmp_path / "run"
    assert call(*train(fast, folder, mistake))[0] == code
    ended, out, err = call(*train(fast, folder))
    assert (ended, err.count("Error")) == (0, 0), err
    line = f"{folder}: nothing has been trained here yet; replaced the older recipe ("
    assert [text for text in out.splitlines() if text.startswith(line) and key in text], out
    assert [change for event in events(folder, "recipe_changed") for change in event["changes"] if key in change]
    assert call(*train(fast, folder))[1].count("replaced") == 0


def test_unreadable_recipe_of_an_untrained_directory_is_replaced_and_kept_in_the_events(
    counted: None, fast: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text("[model]\nnmae = 1\n")
    lines: list[str] = []
    open_run(load_recipe(str(fast)), run, report=lines.append)
    assert len(lines) == 1
    assert "unknown key" in lines[0]
    assert [event["older"] for event in events(run.path, "recipe_changed")] == ["[model]\nnmae = 1\n"]


def test_data_of_an_untrained_directory_is_replaced(counted: None, smoke: Path, fast: Path, tmp_path: Path) -> None:
    """Built-in data of another source, or without partitions, is prepared again; other data is just used."""
    run = RunDir(tmp_path / "run")
    for setting, parts in (("digits", 0), ("digits-dev", 0)):
        opened = open_run(load_recipe(str(smoke), [f"data.source={setting}"]), run)
        assert json.loads((run.path / "data" / "dataset.json").read_text())["source"]["kind"] == setting
        assert len(opened.data.parts) == parts
    assert len(open_run(load_recipe(str(smoke), ["data.decentralized=true"]), run).data.parts) == 2
    other = prepare_dataset("digits", tmp_path / "other")
    opened = open_run(load_recipe(str(fast), [f"data.path={other.path}"]), run)
    assert json.loads((run.path / "plan.json").read_text())["data"] == opened.data.digest == other.digest


def test_smoke_run_of_divided_text_expects_the_samples_that_its_data_has(tmp_path: Path) -> None:
    recipe = load_recipe("docs-llama", ["data.decentralized=true"], smoke_tables)
    opened = open_run(recipe, RunDir(tmp_path / "run"))
    assert len(opened.data.parts) == 4
    assert recipe.data.train_samples in (None, opened.data.samples["train"])


def test_attempt_that_kept_nothing_does_not_hold_the_directory(harness: Harnesses) -> None:
    made = harness("train.max_steps=4")
    folder = made.run.phase("pretrain")
    folder.write_attempt(1, **make_attempt(state="failed", error="out of memory"))
    changed = harness("train.max_steps=4", "train.lr=0.5", folder=made.run.path)
    assert changed.run.load_recipe().train.lr == 0.5
    with acquire_lease(folder.path, changed.context("pretrain").env), pytest.raises(ConfigError, match="invalidate"):
        harness("train.max_steps=4", "train.lr=0.1", folder=made.run.path)
    assert changed.train("pretrain")["steps"] == 4
    with pytest.raises(ConfigError, match="would invalidate meta model"):
        harness("train.max_steps=4", "train.lr=0.1", folder=made.run.path)


# ------------------------------------------------------------------------------------------------ two processes


@pytest.mark.parametrize("denied", ["meta/checkpoints", "modules"])
def test_recipe_is_kept_if_it_is_unknown_whether_a_phase_was_trained(
    denied: str, harness: Harnesses, fast: Path, call: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = harness("train.max_steps=2")
    phase, module = ("pretrain", None) if denied == "meta/checkpoints" else ("incubate", 0)
    made.run.phase(phase, module).checkpoints.joinpath("step-00000001").mkdir(parents=True)
    before = made.run.recipe_file.read_bytes()
    deny(monkeypatch, made.run.path / denied)
    code, out, err = call(*train(fast, made.run.path, "train.lr=0.5"))
    assert (code, out) == (3, "")
    solution = "change its permissions, then run the same command again"
    assert err == f"bigincubate: {made.run.path / denied}: Permission denied; {solution}\n"
    assert made.run.recipe_file.read_bytes() == before


def test_phase_set_up_with_a_replaced_recipe_is_not_trained(harness: Harnesses) -> None:
    made = harness("train.max_steps=2")
    changed = harness("train.max_steps=3", folder=made.run.path)
    with pytest.raises(ConfigError, match="another process replaced the recipe before meta model was trained"):
        made.train("pretrain")
    assert changed.train("pretrain")["steps"] == 3


def test_phase_that_begins_while_the_recipe_is_replaced_keeps_its_plan(
    harness: Harnesses, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is acquired right before the new plan is written: the plan is restored, and the phase is trained."""
    made = harness("train.max_steps=2")
    plan, recipe = (made.run.path / "plan.json").read_bytes(), made.run.recipe_file.read_bytes()
    write = prepare_run.write_json
    begun: list[Any] = []

    def begin(path: Path, value: dict[str, Any]) -> None:
        if not begun:
            begun.append(acquire_lease(made.run.phase("pretrain").path, made.context("pretrain").env))
            begun[0].__enter__()
        write(path, value)

    monkeypatch.setattr(prepare_run, "write_json", begin)
    with pytest.raises(ConfigError, match="would invalidate meta model"):
        open_run(load_recipe(str(fast), ["train.max_steps=3"]), made.run)
    assert ((made.run.path / "plan.json").read_bytes(), made.run.recipe_file.read_bytes()) == (plan, recipe)
    begun[0].__exit__(None, None, None)
    assert made.train("pretrain")["steps"] == 2


def test_recipes_of_many_processes_end_with_one_recipe_and_its_plan(counted: None, fast: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    recipes = [load_recipe(str(fast), [f"train.max_steps={steps}"]) for steps in range(2, 8)]
    threads = [threading.Thread(target=open_run, args=(recipe, run)) for recipe in recipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = run.load_recipe().train.max_steps
    assert {row["steps"] for row in json.loads((run.path / "plan.json").read_text())["rows"][:4]} == {steps}
    assert len(events(run.path, "created")) == 1


def test_lease_when_free_waits_for_its_owner(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with acquire_lease_when_free(tmp_path):
            order.append("second")

    with acquire_lease_when_free(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
