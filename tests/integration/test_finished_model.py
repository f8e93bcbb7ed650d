"""Fine-tuning of a finished model on other data: `finetune.init`, from runs, exports, files and hubs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from forked import run
from image_trees import write_tree
from safetensors.torch import load_file, save_file
from test_expansion import interrupt_fine_tuning
from test_pretrained import VIT, hub, publish  # noqa: F401  a fixture
from timm.layers import resample_abs_pos_embed

from bigincubate import api
from bigincubate.config import load_recipe
from bigincubate.data.prepare import prepare_dataset
from bigincubate.errors import ArtifactError, BigincubateError, ConfigError
from bigincubate.files import drop_folders, read_json
from bigincubate.interchange.export import export, load_model
from bigincubate.planning.context import open_run
from bigincubate.report.model_card import export_with_card
from bigincubate.report.page import render_report
from bigincubate.report.run_data import read_run
from bigincubate.report.status import run_status
from bigincubate.report.verify import Verdict, verify_run
from bigincubate.storage.artifacts import load_artifact, load_manifest
from bigincubate.storage.finished_models import describe_training
from bigincubate.training.builder import build_model

Harnesses = Callable[..., Any]
SHORT = "train.max_steps=4"
HEAD = ["head.weight", "head.bias"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes."""
    folder = tmp_path_factory.mktemp("other")
    prepare_dataset(str(write_tree(folder / "tree", 40)), folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def source(done: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run on ten classes, with its export."""
    copied = done.copy(tmp_path_factory.mktemp("source") / "run")
    export(copied.run.path, copied.run.exported)
    return copied


@pytest.fixture(scope="module")
def moved(source: Any, other: Path, harness: Harnesses) -> Any:
    """The finished model of `source`, fine-tuned on the three classes."""
    made = harness(SHORT, f"finetune.init={source.run.path}", f"data.path={other}", "model.num_classes=3")
    made.train("finetune")
    return made


def start(made: Any) -> dict[str, torch.Tensor]:
    """The weights with which fine-tuning starts."""
    return build_model(made.context("finetune"))[0].state_dict()


def test_model_card_says_that_a_finished_model_was_fine_tuned(moved: Any, source: Any, tmp_path: Path) -> None:
    export_with_card(moved.run.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "It is a finished model that `bigincubate` fine-tuned on other data. Training started from `run (SHA-256 "
        in card
    )
    assert "(matrix products and convolutions, without the training of the model that it started from)" in card
    for file in ("README.md", "config.json"):
        assert str(source.run.path.parent) not in (tmp_path / "out" / file).read_text()


def on_other(init: object, other: Path, *sets: str) -> list[str]:
    return [SHORT, f"finetune.init={init}", f"data.path={other}", "model.num_classes=3", *sets]


# ------------------------------------------------------------------------------------------------ weights


def test_model_of_other_classes_starts_with_a_new_head(
    moved: Any, source: Any, harness: Harnesses, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, _ = load_artifact(source.run.phase("finetune").artifact)
    with caplog.at_level(logging.INFO, "bigincubate"):
        state = start(moved)
    assert all(torch.equal(state[name], trained[name]) for name in trained if name not in HEAD)
    assert state["head.weight"].shape == (3, 24)
    digest = load_manifest(source.run.phase("finetune").artifact).digest
    [line] = [line for line in caplog.messages if "fine-tuning starts from" in line]
    assert line.endswith(f"{source.run.path} (SHA-256 {digest}); new tensors: head.weight, head.bias")
    again = harness(*on_other(source.run.path, other, "train.seed=1"))
    assert not torch.equal(start(again)["head.weight"], state["head.weight"])
    assert torch.equal(start(moved)["head.weight"], state["head.weight"])


def test_head_is_kept_unless_the_classes_are_others(
    source: Any, harness: Harnesses, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, _ = load_artifact(source.run.phase("finetune").artifact)
    with caplog.at_level(logging.INFO, "bigincubate"):
        same = start(harness(SHORT, f"finetune.init={source.run.path}", "train.seed=1"))
    assert all(torch.equal(same[name], trained[name]) for name in trained)
    assert caplog.messages[-1].endswith("new tensors: none")
    prepare_dataset(str(write_tree(tmp_path / "tree", 40, "abcdefghij")), tmp_path / "data")
    renamed = [SHORT, f"data.path={tmp_path / 'data'}"]
    for init in (source.run.path, source.run.exported):
        state = start(harness(*renamed, f"finetune.init={init}"))
        assert not torch.equal(state["head.weight"], trained["head.weight"])
        assert torch.equal(state["norm.weight"], trained["norm.weight"])
    unknown = start(harness(*renamed, f"finetune.init={source.run.exported / 'model.safetensors'}"))
    assert torch.equal(unknown["head.weight"], trained["head.weight"])


def test_every_form_of_a_model_gives_the_same_start(
    source: Any, harness: Harnesses, other: Path, tmp_path: Path
) -> None:
    exported = source.run.exported
    torch.save({"model": load_file(exported / "model.safetensors")}, tmp_path / "model.pth")
    forms = [exported, source.run.phase("finetune").path, source.run.phase("finetune").artifact]
    forms += [exported / "model.safetensors", tmp_path / "model.pth"]
    states = [
        start(harness(*on_other(init, other))) for init in (source.run.path, *forms, f"timm:local-dir:{exported}")
    ]
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_model_of_a_hub_is_fine_tuned(harness: Harnesses, other: Path, hub: Path, tmp_path: Path) -> None:  # noqa: F811
    torch.manual_seed(1)
    theirs = timm.create_model(VIT, embed_dim=24, num_heads=3, depth=4).state_dict()  # 224 pixels, 1000 classes
    save_file(theirs, tmp_path / "model.safetensors")
    publish(hub, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", tmp_path / "model.safetensors")
    # timm builds the twelve blocks of the name
    with pytest.raises(
        ConfigError, match=r"Missing key.*set model.name and model.args to those of the pretrained model"
    ):
        start(harness(*on_other(f"timm:{VIT}", other)))
    theirs = timm.create_model(VIT, embed_dim=24, num_heads=3).state_dict()
    shutil.rmtree(hub)
    save_file(theirs, tmp_path / "model.safetensors")
    publish(hub, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", tmp_path / "model.safetensors")
    made = harness(*on_other(f"timm:{VIT}", other, "plan.target_depths=[6, 6]", "train.max_steps=1"))
    assert torch.equal(start(made)["blocks.11.mlp.fc2.bias"], theirs["blocks.11.mlp.fc2.bias"])
    made.train("finetune")
    manifest = load_manifest(made.run.phase("finetune").artifact)
    assert manifest.identity["finetune.init"] == manifest.model.initial_weights == f"timm:{VIT}"


def test_larger_images_are_fine_tuned(source: Any, harness: Harnesses, other: Path) -> None:
    trained, _ = load_artifact(source.run.phase("finetune").artifact)
    state = start(harness(*on_other(source.run.path, other, "model.img_size=12")))
    resampled = resample_abs_pos_embed(trained["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(state["pos_embed"], resampled)


# ------------------------------------------------------------------------------------------------ the plan


def test_plan_has_no_phase_before_fine_tuning(moved: Any, source: Any) -> None:
    assert [row.key for row in moved.rows] == ["finetune", "end_to_end"]
    tuned, baseline = moved.rows
    assert (tuned.steps, baseline.total_flops) == (4, tuned.total_flops)
    assert sorted(path.name for path in moved.run.path.iterdir() if path.is_dir()) == ["finetune", "fleet", "owners"]
    for phase, module in (("pretrain", None), ("incubate", 0)):
        with pytest.raises(ConfigError, match=f"--phase {phase}: finetune.init = .* use --phase finetune$"):
            moved.context(phase, module)
    costs = api.plan(moved.recipe, cluster="nodes=1,gpus=2,tflops=1")
    assert costs["incubation_flops"] == tuned.total_flops


def test_length_is_that_of_its_own_settings(source: Any, harness: Harnesses, other: Path) -> None:
    epochs = [
        harness(*on_other(source.run.path, other, f"finetune.budget={each}")).rows[0].steps
        for each in ("epochs", "equal_flops")
    ]
    assert epochs == [4, 4]


def test_artifact_says_where_its_weights_come_from(moved: Any, source: Any, tmp_path: Path) -> None:
    first = load_manifest(source.run.phase("finetune").artifact)
    manifest = load_manifest(moved.run.phase("finetune").artifact)
    assert manifest.identity["finetune.init"] == first.digest
    assert manifest.identity["slots"] == [{"modules": 2, "depths": [2], "source": "finished"}]
    assert manifest.inputs == {}
    described = f"{source.run.path} (SHA-256 {first.digest})"
    assert manifest.model.initial_weights == described
    export(moved.run.path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["description"] == f"initialized from {drop_folders(described)}"
    assert load_model(tmp_path / "out")[0](torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_identity_depends_on_the_weights_and_not_on_their_place(
    moved: Any, source: Any, harness: Harnesses, other: Path, tmp_path: Path
) -> None:
    copied = source.copy(tmp_path / "elsewhere")
    again = moved.copy(tmp_path / "run")
    opened = open_run(load_recipe(again.run.recipe_file, [f"finetune.init={copied.run.path}"]), again.run)
    assert opened.rows == moved.rows
    different = harness(SHORT, "train.seed=1", "plan.incubate=none")
    different.train("pretrain")
    different.train("finetune")
    with pytest.raises(ConfigError, match=r"finetune.init: .* would invalidate fine-tuning"):
        open_run(load_recipe(again.run.recipe_file, [f"finetune.init={different.run.path}"]), again.run)


def test_weights_that_changed_after_planning_are_refused(
    source: Any, harness: Harnesses, other: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(source.run.exported / "model.safetensors", file)
    made = harness(*on_other(file, other))
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match=r"has other weights \(SHA-256 .*: restore them, or use another --run-dir$"):
        made.train("finetune")


# ------------------------------------------------------------------------------------------------ reports


def test_reports_name_the_finished_model_and_its_flops(moved: Any, source: Any, call: Any, tmp_path: Path) -> None:
    assert [row["title"] for row in run_status(moved.run)] == ["fine-tuning"]
    findings = list(verify_run(moved.run))
    assert {each.verdict for each in findings} == {Verdict.GOOD}
    before = sum(each["flops"] for each in (source.run.phase("pretrain").result, source.run.phase("finetune").result))
    before += sum(source.run.phase("incubate", module).result["flops"] for module in (0, 1))
    plan = read_json(moved.run.path / "plan.json") or {}
    assert plan["initial_weights"] == {"source": str(source.run.path), "flops": before}
    page = render_report(read_run(moved.run), findings)
    assert f"{source.run.path}; its " in page
    assert "of training are not part of the costs below" in page
    assert "meta model</dt>" not in page
    assert "assembled" not in page.partition("<h2>Curves")[0]
    code, out, err = call("compare", moved.run.path, source.run.path, "--json")
    assert code == 0, err
    assert [(row["route"], row["meta"] is None, row["missing"]) for row in json.loads(out)] == [
        ("fine-tuned", True, []),
        ("incubated", False, []),
    ]
    assert json.loads(out)[0]["flops"] == moved.rows[0].total_flops
    code, out, err = call("compare", moved.run.path, source.run.path)
    assert code == 0, err
    assert "end to end" not in out


@pytest.mark.parametrize("form", ["export", "chain", "pretrained"])
def test_flops_of_the_finished_model_are_known_only_if_all_are(
    form: str, moved: Any, source: Any, harness: Harnesses, other: Path, digits: Path
) -> None:
    def known(init: object) -> int | None:
        plan = read_json(harness(*on_other(init, other)).run.path / "plan.json") or {}
        flops: int | None = plan["initial_weights"]["flops"]
        return flops

    if form == "export":
        assert known(source.run.exported) is None
    elif form == "chain":
        assert known(moved.run.path) == known(source.run.path) + moved.run.phase("finetune").result["flops"]
    else:
        made = harness(SHORT, f"meta.init={source.run.exported}", "plan.incubate=none")
        made.train("pretrain")
        made.train("finetune")
        assert known(made.run.path) is None


@pytest.mark.parametrize("rows", ["null", '"abc"', '[{"x": 1}]', '[{"phase": "../../x", "module": null}]'])
def test_flops_are_unknown_if_the_plan_of_the_source_is_damaged(source: Any, tmp_path: Path, rows: str) -> None:
    copied = source.copy(tmp_path / "run")
    (copied.run.path / "plan.json").write_text(f'{{"rows": {rows}}}')
    assert describe_training(str(copied.run.path)) == {"source": str(copied.run.path), "flops": None}


def test_report_says_that_flops_are_unknown(source: Any, harness: Harnesses, other: Path) -> None:
    made = harness(*on_other(source.run.exported, other, "train.max_steps=1"))
    made.train("finetune")
    page = render_report(read_run(made.run), [])
    assert f"{source.run.exported}; its training FLOPs are unknown, and not part of the costs below" in page


def test_baseline_is_a_route_of_its_own(source: Any, harness: Harnesses, other: Path) -> None:
    made = harness(*on_other(source.run.path, other, "train.max_steps=2"))
    made.train("finetune")
    made.train("end_to_end")
    found = read_run(made.run)
    assert [(route.name, route.is_baseline) for route in found.routes] == [("fine-tuned", False), ("end to end", True)]
    assert found.baseline is found.routes[1]
    assert "Fine-tuned " in render_report(found, [])


# ------------------------------------------------------------------------------------------------ the command line


def test_killed_and_resumed_fine_tuning_exports_the_same_bits(
    source: Any, other: Path, fast: Path, tmp_path: Path
) -> None:
    """Ctrl-C, then kill -9, then the same command; once more it is done."""
    sets = on_other(source.run.path, other, "train.max_steps=40", "checkpoint.every_steps=5")
    words = [fast, "--jobs", "2", *(f"--set={each}" for each in sets)]
    whole = run("run", *words, "--run-dir", tmp_path / "whole")
    assert whole.wait(240) == 0, whole.out + whole.err
    assert "1 phase," in whole.out
    folder = tmp_path / "killed"
    interrupt_fine_tuning(words, folder, steps=(5, 20))
    last = run("run", *words, "--run-dir", folder)
    assert last.wait(240) == 0, last.out + last.err
    weights = [path / "export" / "model.safetensors" for path in (tmp_path / "whole", folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    again = run("run", folder / "recipe.toml", "--run-dir", folder)
    assert again.wait() == 0, again.err
    assert "is already done" in again.out
    scored = run("evaluate", folder, "--data", other, "--json")
    assert scored.wait() == 0, scored.err
    assert json.loads(scored.out)["top1"] == (read_json(folder / "finetune" / "DONE") or {})["metrics"]["top1"]


def test_fork_takes_over_the_fine_tuning(moved: Any, tmp_path: Path, call: Any) -> None:
    code, out, err = call("fork", moved.run.path, tmp_path / "new", "--set", "log.every_steps=1")
    assert code == 0, err
    assert "fine-tuning  taken over: finished" in out
    assert "meta model" not in out
    code, _, err = call("fork", moved.run.path, tmp_path / "newer", "--set", "finetune.train.lr=1e-4")
    assert code == 2
    assert "no phase of" in err


def test_one_job_is_submitted_and_no_array(source: Any, other: Path, fast: Path, tmp_path: Path, call: Any) -> None:
    words = ["submit", fast, "--run-dir", tmp_path / "run", "--dry-run"]
    words += [f"--set={each}" for each in on_other(source.run.path, other)]
    code, out, err = call(*words)
    assert code == 0, err
    commands = [line.split() for line in out.splitlines() if line.startswith("sbatch ")]
    assert not any(word.startswith("--array") for command in commands for word in command)
    assert [command[-3] if "gate" not in command[2] else "gate" for command in commands] == ["finetune", "gate"]
    assert "--dependency=afterany:FINETUNE" in commands[1]


def test_plan_names_the_finished_model(source: Any, other: Path, fast: Path, call: Any, tmp_path: Path) -> None:
    sets = [f"--set={each}" for each in on_other(source.run.path, other)]
    code, out, err = call("plan", fast, *sets)
    assert code == 0, err
    assert f"without those of {source.run.path}; 1.000 times the" in out
    assert "meta model" not in out


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "--set=meta.init=x"], "meta.init is of the meta model; remove it"),
        (["plan", "--set=plan.incubate=[1]"], 'plan.incubate is of the modules; set it to "all"'),
        (["plan", "--method", "expand"], 'plan.incubate is of the modules; set it to "all"'),
        (["plan", "--method", "incubate"], "--method incubate: finetune.init is a finished model without modules"),
        (["plan", "--set=data.decentralized=true"], "data.decentralized is of the modules; set it to false"),
        (["plan", "--ways"], "omit --ways, or finetune.init"),
        (["run", "--smoke"], "omit --smoke or finetune.init"),
        (["run", "--co-train"], "--co-train: finetune.init is a finished model"),
        (["train", "--phase", "pretrain"], "there is no meta model and no module; use --phase finetune"),
        (
            ["train", "--phase", "incubate", "--module", "0"],
            "there is no meta model and no module; use --phase finetune",
        ),
        (["plan", "--set=finetune.init=timm:"], "finetune.init: expected a path, or"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    words: list[str], says: str, source: Any, other: Path, fast: Path, tmp_path: Path, call: Any
) -> None:
    sets = [f"--set={each}" for each in on_other(source.run.path, other)]
    where = [] if words[0] == "plan" else ["--run-dir", tmp_path / "run"]
    code, _, err = call(words[0], fast, *where, *sets, *words[1:])
    assert (code, err.count("\n")) == (2, 1), err
    assert says in err


def test_modules_cannot_be_imported(moved: Any, source: Any, call: Any) -> None:
    for part in ("meta", "modules"):
        code, _, err = call("import", moved.run.recipe_file, source.run.path, "--as", part, "--to", moved.run.path)
        assert (code, err.count("\n")) == (2, 1)
        assert "so the run has no meta model and no module; remove finetune.init" in err


ARGS = "model.args={ patch_size = 2, embed_dim = 48, num_heads = 3 }"
OTHERS: list[tuple[str, str]] = [
    ("plan.target_depths=[2, 3]", r"has 4 blocks, but the target 5: set plan\.target_depths to numbers with this sum"),
    (ARGS, r"has embed_dim = 24, the recipe 48: set model\.args\.embed_dim = 24"),
    ("model.args.num_heads=6", r"has num_heads = 3, the recipe 6: set model\.args\.num_heads = 3"),
    ("model.args.init_values=0.1", r"has init_values = None, the recipe 0\.1: remove model\.args\.init_values"),
    ("model.name=vit_small_patch16_224", r"is a vit_tiny_patch16_224 model, but model\.name = 'vit_small_patch16_224'"),
]


@pytest.mark.parametrize(("key", "says"), OTHERS)
def test_other_architecture_is_refused_in_one_line(
    key: str, says: str, source: Any, harness: Harnesses, other: Path
) -> None:
    for init in (source.run.path, source.run.exported):
        with pytest.raises(ConfigError, match=says) as caught:
            start(harness(*on_other(init, other, key)))
        assert str(caught.value).startswith(f"finetune.init = '{init}' ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [ARGS, "model.args.init_values=0.1"])
def test_file_of_another_architecture_is_refused_in_one_line(
    key: str, source: Any, harness: Harnesses, other: Path
) -> None:
    says = r"(size mismatch for|Missing key).*set model.name and model.args to those of the pretrained model$"
    with pytest.raises(ConfigError, match=says) as caught:
        start(harness(*on_other(source.run.exported / "model.safetensors", other, key)))
    assert "\n" not in str(caught.value)


def test_missing_and_unfinished_models_are_refused(
    done: Any, source: Any, harness: Harnesses, other: Path, tmp_path: Path
) -> None:
    unfinished = source.copy(tmp_path / "unfinished", ["meta"])
    refused: list[tuple[Path, type[BigincubateError], str]] = [
        (tmp_path / "nothing", ArtifactError, "nothing: No such file or directory"),
        (unfinished.run.path, ArtifactError, "unfinished has no finished model yet; continue with: bigincubate run"),
        (tmp_path, ArtifactError, "no artifact in"),
    ]
    for init, kind, says in refused:
        with pytest.raises(kind, match=says) as caught:
            harness(*on_other(init, other))
        assert str(caught.value).startswith(f"finetune.init = '{init}': ")
        assert "\n" not in str(caught.value)
    module = harness(*on_other(source.run.phase("incubate", 0).path, other))
    with pytest.raises(ArtifactError, match="is module 0, a part of a model; give a run or a full model"):
        module.train("finetune")
