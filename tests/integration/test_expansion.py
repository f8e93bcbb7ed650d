"""Runs that incubate only some modules or none: fine-tuning makes the others from the meta model."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, fork_ranks, hold_step, run
from timm.layers import resample_abs_pos_embed

from bigincubate import api
from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError
from bigincubate.files import read_json
from bigincubate.interchange.export import load_model
from bigincubate.planning.context import open_run
from bigincubate.planning.job_graph import build_job_graph
from bigincubate.report.console_tables import summary_table
from bigincubate.report.page import render_report
from bigincubate.report.run_data import read_run
from bigincubate.report.status import run_status
from bigincubate.report.verify import Verdict, verify_run
from bigincubate.storage.artifacts import load_manifest
from bigincubate.training.builder import build_model

Harnesses = Callable[..., Any]
SHORT = "train.max_steps=4"


def keys(harness: Any) -> list[str]:
    return [row.key for row in harness.rows]


def final_inputs(harness: Any) -> dict[str, str]:
    return load_manifest(harness.run.phase("finetune").artifact).inputs


def digest(harness: Any, phase: str, module: int | None = None) -> str:
    return load_manifest(harness.run.phase(phase, module).artifact).digest


def check_reports(harness: Any, *titles: str) -> str:
    """Check that every report shows these phases and no others; return the page."""
    done = harness.run.update_summary()
    with_assembled = [*titles[:-1], "assembled", titles[-1]]
    assert [row["title"] for row in run_status(harness.run)] == list(titles)
    table = summary_table("name", done, harness.rows)
    shown = [str(cell).removesuffix(" (as a hybrid)") for cell in table.columns[0].cells]
    assert shown == [{"fine-tuning": "fine-tuned"}.get(title, title) for title in with_assembled]
    findings = list(verify_run(harness.run))
    assert {each.verdict for each in findings} <= {Verdict.GOOD, Verdict.UNFINISHED}, findings
    return render_report(read_run(harness.run), findings)


# ------------------------------------------------------------------------------------------------ no module


@pytest.fixture(scope="module")
def expanded(harness: Harnesses) -> Any:
    made = harness(SHORT, "plan.incubate=none")
    made.train("pretrain")
    made.train("finetune")
    return made


def test_expanded_model_starts_as_the_function_of_the_meta_model(expanded: Any) -> None:
    """With `expand.init = "grow"`, its default."""
    meta, assembled = expanded.run.phase("pretrain").result, expanded.run.assembled.result
    assert assembled["metrics"] == pytest.approx(meta["metrics"], abs=1e-4)
    model, inputs = build_model(expanded.context("finetune"))
    state, source = model.state_dict(), expanded.weights("pretrain")
    for here, there in ((0, 0), (2, 1)):
        assert torch.equal(state[f"blocks.{here}.mlp.fc1.weight"], source[f"blocks.{there}.mlp.fc1.weight"])
        assert state[f"blocks.{here + 1}.mlp.fc2.weight"].count_nonzero() == 0
        assert state[f"blocks.{here + 1}.mlp.fc1.weight"].count_nonzero() > 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(inputs) == ["meta"]


def test_expansion_has_no_phases_of_modules(expanded: Any) -> None:
    assert keys(expanded) == ["pretrain", "finetune", "end_to_end"]
    assert final_inputs(expanded) == {"meta": digest(expanded, "pretrain")}
    assert not (expanded.run.path / "modules").exists()
    assert build_job_graph(expanded.rows, baseline=False)[1].needs == ("pretrain",)
    page = check_reports(expanded, "meta model", "fine-tuning")
    assert "2, not incubated, made from the meta model: grow" in page
    assert "Do the modules fit together?" not in page
    route = read_run(expanded.run).main
    assert route is not None
    assert (route.name, route.meta, route.modules) == ("expanded", route.phases[0], [])


@pytest.mark.parametrize(("init", "blocks"), [("stack", [0, 0, 1, 1]), ("g_stack", [0, 1, 0, 1])])
def test_expanded_model_repeats_the_blocks_of_the_meta_model(
    init: str, blocks: list[int], expanded: Any, tmp_path: Path
) -> None:
    other = expanded.copy(tmp_path / "run", ["meta"])
    opened = open_run(load_recipe(other.run.recipe_file, [f"expand.init={init}"]), other.run)
    state, meta = build_model(opened.phase("finetune"))[0].state_dict(), expanded.weights("pretrain")
    for here, there in enumerate(blocks):
        assert torch.equal(state[f"blocks.{here}.mlp.fc1.weight"], meta[f"blocks.{there}.mlp.fc1.weight"])
    assert torch.equal(state["head.weight"], meta["head.weight"])


def test_cost_and_duration_are_planned_without_modules(expanded: Any) -> None:
    costs = api.plan(expanded.recipe, cluster="nodes=1,gpus=2,tflops=1")
    rows = {row["key"]: row["total_flops"] for row in costs["rows"]}
    assert costs["incubation_flops"] == rows["pretrain"] + rows["finetune"]
    assert costs["cluster"]["seconds"] == pytest.approx((rows["pretrain"] + rows["finetune"]) / 2e12)


def test_ways_are_compared_in_a_table(fast: Path, call: Any) -> None:
    words = ["plan", fast, "--ways", "--cluster", "gpus=2,tflops=1"]
    code, out, err = call(*words, "--set", "data.train_samples=416", "--set", "plan.incubate=[1]")
    assert code == 0, err
    table = out.split("ways to train the target with 2 workers")[1].splitlines()[1:7]
    titles = ["way", "incubation", "incubation of 1", "expansion", "end to end", "meta model alone"]
    assert [line.split("  ")[0].strip() for line in table] == titles
    assert len({len(re.split(r"\s{2,}", line.strip())) for line in table}) == 1
    assert "separate" in out


def test_baseline_has_the_flops_of_an_incubation_of_all_modules(expanded: Any, harness: Harnesses) -> None:
    assert expanded.rows[-1] == harness(SHORT).rows[-1]


def test_killed_and_resumed_expansion_exports_the_same_bits(fast: Path, tmp_path: Path) -> None:
    """Ctrl-C in fine-tuning, then kill -9, then the same command."""
    sets = ["train.max_steps=60", "checkpoint.every_steps=5", "plan.incubate=none"]
    words = [fast, "--jobs", "2", *(f"--set={each}" for each in sets)]
    whole = run("run", *words, "--run-dir", tmp_path / "whole")
    assert whole.wait(240) == 0, whole.out + whole.err
    assert "meta model" in whole.out
    assert "module 0" not in whole.out

    folder = tmp_path / "killed"
    interrupt_fine_tuning(words, folder, steps=(10, 30))
    last = run("run", *words, "--run-dir", folder)
    assert last.wait(240) == 0, last.out + last.err
    weights = [path / "export" / "model.safetensors" for path in (tmp_path / "whole", folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def interrupt_fine_tuning(words: Sequence[Any], folder: Path, steps: tuple[int, int]) -> None:
    """Stop a run with Ctrl-C after it has saved the first of two steps of fine-tuning, and kill it after the second."""
    for number, step in zip((signal.SIGINT, signal.SIGKILL), steps, strict=True):
        launched = Command("run", *words, "--run-dir", folder, before=partial(hold_fine_tuning, step + 1))
        reached = partial(has_saved, folder / "finetune" / "checkpoints", step)
        assert launched.until(reached, pause=0.01), launched.out + launched.err
        os.killpg(launched.pid, number)
        assert launched.wait() in (75, -signal.SIGKILL)
    assert not (folder / "finetune" / "DONE").exists()


def hold_fine_tuning(step: int) -> None:
    """As a shell, give a command its own process group; its phases, without imports, wait before a step."""
    os.setpgrp()
    fork_ranks()
    hold_step(step, "finetune")


def has_saved(checkpoints: Path, step: int) -> bool:
    """Return whether there is a complete checkpoint of this step or a later one."""
    return any(int(path.parent.name[5:]) >= step for path in checkpoints.glob("step-*/COMMITTED"))


def test_larger_images_are_fine_tuned_from_an_expanded_meta_model(expanded: Any, tmp_path: Path) -> None:
    """As ImageNet models are fine-tuned with 384 after 224 pixels."""
    other = expanded.copy(tmp_path / "run", ["meta"])
    sets = [SHORT, "plan.incubate=none", "finetune.model.img_size=12"]
    larger = type(other)(other.run.recipe_file, other.run.path, *sets)
    model, _ = build_model(larger.context("finetune"))
    state, meta = model.state_dict(), larger.weights("pretrain")
    assert (meta["pos_embed"].shape, state["pos_embed"].shape) == ((1, 17, 24), (1, 37, 24))
    assert torch.equal(state["pos_embed"][:, 0], meta["pos_embed"][:, 0])  # of the class token
    resampled = resample_abs_pos_embed(meta["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(state["pos_embed"], resampled)
    assert state["blocks.1.mlp.fc2.weight"].count_nonzero() == 0
    assert larger.train("finetune")["metrics"]
    exported, spec = load_model(larger.run.phase("finetune").artifact)
    assert spec.model.img_size == 12
    assert exported(torch.zeros(1, 3, 12, 12)).shape == (1, 10)
    # larger images cost more: fewer steps for the FLOPs of the modules
    assert larger.rows[1].steps < expanded.rows[1].steps


# ------------------------------------------------------------------------------------------------ some modules


@pytest.fixture(scope="module")
def partly(harness: Harnesses) -> Any:
    """Module 1 of three is incubated."""
    depths = ("plan.target_depths=[2, 2, 3]", "plan.meta_depths=[1, 1, 1]")
    made = harness(SHORT, *depths, "plan.incubate=[1]")
    for phase, module in (("pretrain", None), ("incubate", 1), ("finetune", None)):
        made.train(phase, module)
    return made


def test_fine_tuning_joins_incubated_and_expanded_modules(partly: Any) -> None:
    model, inputs = build_model(partly.context("finetune"))
    state, meta, module = model.state_dict(), partly.weights("pretrain"), partly.weights("incubate", 1)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.items())
    assert {name.split(".")[1] for name in module} == {"2", "3"}
    for here, there in ((0, 0), (4, 2)):
        assert torch.equal(state[f"blocks.{here}.attn.qkv.weight"], meta[f"blocks.{there}.attn.qkv.weight"])
    for grown in (1, 5, 6):
        assert state[f"blocks.{grown}.attn.proj.weight"].count_nonzero() == 0
    for name in ("pos_embed", "head.weight", "norm.bias"):
        assert torch.equal(state[name], meta[name])
    assert {name: manifest.digest for name, manifest in inputs.items()} == final_inputs(partly)
    assert final_inputs(partly) == {"meta": digest(partly, "pretrain"), "module/1": digest(partly, "incubate", 1)}


def test_reports_show_a_module_under_its_own_number(partly: Any) -> None:
    assert keys(partly) == ["pretrain", "incubate/1", "finetune", "end_to_end"]
    page = check_reports(partly, "meta model", "module 1", "fine-tuning")
    assert "3; 1 incubated, initialized: boundary; the others made from the meta model: grow" in page
    summary = read_json(partly.run.path / "summary.json")
    assert summary is not None
    assert [result is not None for result in summary["modules"]] == [False, True]
    scored = partly.run.phase("incubate", 1).partial
    assert (scored["joined"], scored["modules"]) == ([1], 3)
    # the other modules compute what their counterparts in the meta model do
    assert partly.run.assembled.result["metrics"] == pytest.approx(scored["metrics"], abs=1e-4)


def test_module_that_is_not_incubated_cannot_be_trained(partly: Any) -> None:
    with pytest.raises(ConfigError, match=r"--module 0 is not incubated: plan\.incubate lists 1$"):
        partly.context("incubate", 0)


def test_logs_of_a_module_that_is_not_incubated_are_not_awaited(partly: Any, call: Any) -> None:
    code, _, err = call("logs", partly.run.path, "--module", 0)
    assert (code, err) == (2, "bigincubate: --module 0 is not incubated (plan.incubate), so it has no logs\n")


def test_expanded_and_incubated_runs_are_compared(
    expanded: Any, partly: Any, harness: Harnesses, tmp_path: Path, call: Any
) -> None:
    whole = harness(SHORT)
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        whole.train(phase, module)
    folders = [one.copy(tmp_path / name).run.path for one, name in ((expanded, "a"), (whole, "b"), (partly, "c"))]
    code, out, err = call("compare", *folders, "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["run"], row["route"], row["missing"]) for row in rows] == [
        ("a", "expanded", []),
        ("b", "incubated", []),
        ("c", "incubated", []),
    ]
    assert [len(row["hybrids"]) for row in rows] == [0, 2, 1]
    for row, one in zip(rows, (expanded, whole, partly), strict=True):
        assert row["metrics"] == one.run.phase("finetune").result["metrics"]
        assert row["meta"] == one.run.phase("pretrain").result["metrics"]
        assert row["assembled"] == one.run.assembled.result["metrics"]
    # the same FLOPs but for what is left of one step, and no module in parallel with another
    assert rows[0]["flops"] <= rows[1]["flops"]
    assert rows[1]["flops"] - rows[0]["flops"] == expanded.rows[1].unused_flops
    assert rows[0]["path_seconds"] == pytest.approx(rows[0]["seconds"])
    code, out, err = call("compare", *folders, "--out", tmp_path / "drawn")
    assert code == 0, err
    assert all(any(line.startswith(f"{name} ") for line in out.splitlines()) for name in "abc"), out
    for drawing in ("progress", "before-after", "modules"):
        assert (tmp_path / "drawn" / f"{drawing}.png").stat().st_size > 1000
    code, _, err = call("compare", folders[0], "--out", tmp_path / "alone")
    assert code == 0, err
    assert not (tmp_path / "alone" / "modules.png").exists()


# ------------------------------------------------------------------------------------------------ a changed choice


def test_meta_model_and_modules_stay_valid_when_fewer_are_incubated(partly: Any, tmp_path: Path) -> None:
    other = partly.copy(tmp_path / "run", ["meta", "modules"])
    recipe = load_recipe(other.run.recipe_file, ["plan.incubate=none"])
    assert [phase.key for phase in api.fork(other.run.path, tmp_path / "fork", recipe).phases if phase.taken] == [
        "pretrain"
    ]
    open_run(recipe, other.run)  # fine-tuning has not begun
    assert [row["phase"] for row in run_status(other.run)] == ["pretrain", "finetune"]
    assert other.run.update_summary()["modules"] == []
    with pytest.raises(ConfigError, match=r'plan\.incubate: \[1\] -> "none" would invalidate fine-tuning;'):
        open_run(recipe, partly.copy(tmp_path / "begun").run)


def test_initialization_of_expanded_modules_matters_only_where_there_are_some(harness: Harnesses) -> None:
    def identity(*sets: str) -> dict[str, Any]:
        found: dict[str, Any] = next(row.identity for row in harness(SHORT, *sets).rows if row.phase == "finetune")
        return found

    assert identity() == identity("expand.init=boundary") == identity("plan.incubate=[0, 1]")
    some = identity("plan.incubate=[0]", "expand.init=boundary")
    assert some == identity("plan.incubate=[0]") | {"expand.init": "boundary"}
    assert [slot["source"] for slot in some["slots"]] == ["module", "expand"]


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(("method", "phases"), [("expand", ["pretrain", "finetune"]), ("incubate", None)])
def test_method_is_short_for_which_modules_are_incubated(
    method: str, phases: list[str] | None, fast: Path, tmp_path: Path, call: Any
) -> None:
    code, out, err = call("plan", fast, "--method", method, "--set", "data.train_samples=416", "--json")
    assert code == 0, err
    found = [row["key"] for row in json.loads(out)["rows"] if row["key"] != "end_to_end"]
    assert found == (phases or ["pretrain", "incubate/0", "incubate/1", "finetune"])
    code, out, err = call("submit", fast, "--run-dir", tmp_path / "r", "--dry-run", "--method", method)
    assert code == 0, err
    commands = [line for line in out.splitlines() if line.startswith("sbatch ")]
    assert any("--array=" in line for line in commands) == (phases is None)


def test_expansion_runs_from_the_command_line_alone_and_again(fast: Path, tmp_path: Path) -> None:
    words = ["run", fast, "--run-dir", tmp_path / "run", "--method", "expand", "--set", "train.max_steps=2"]
    first = run(*words)
    assert first.wait(240) == 0, first.out + first.err
    assert load_recipe(tmp_path / "run" / "recipe.toml").plan.incubate == "none"
    again = run(*words)
    assert again.wait() == 0, again.err
    assert "is already done" in again.out
    # the recipe of the run says which method it is
    again = run("run", tmp_path / "run" / "recipe.toml", "--run-dir", tmp_path / "run")
    assert again.wait() == 0, again.err
    assert "is already done" in again.out


@pytest.mark.parametrize("command", ["run", "submit", "plan"])
def test_method_and_its_key_cannot_both_be_given(command: str, fast: Path, tmp_path: Path, call: Any) -> None:
    where = [] if command == "plan" else ["--run-dir", tmp_path / "r"]
    code, _, err = call(command, fast, *where, "--method", "expand", "--set", "plan.incubate=all")
    assert (code, err.count("\n")) == (2, 1)
    assert "--method expand stands for --set plan.incubate=" in err
    code, _, err = call(command, fast, *where, "--method", "grow")
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "r").exists()
