"""The command line: what a user can get wrong is one line with a documented exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Harnesses = Callable[..., Any]
Called = Callable[..., Any]


PLAIN = "[model]\nname = 'vit_tiny_patch16_224'\n[plan]\ntarget_depths = [2]\nmeta_depths = [1]\n"
META = "meta/checkpoints/step-00000002"
Wrong = Callable[[Any], list[object]]
WRONG: dict[str, tuple[int, str, Wrong]] = {
    # ------------------------------------------------------------------------ 2: usage and configuration
    "unknown command": (2, "No such command", lambda p: ["frobnicate"]),
    "unknown flag": (2, "--frob", lambda p: ["plan", "digits", "--frob"]),
    "missing option": (2, "--run-dir", lambda p: ["run", "digits"]),
    "missing argument": (2, "RECIPE", lambda p: ["plan"]),
    "no jobs": (2, "jobs", lambda p: ["run", p.fast, "--run-dir", p.new, "--jobs", 0]),
    "no ranks": (2, "nproc", lambda p: ["run", p.fast, "--run-dir", p.new, "--nproc", 0]),
    "jobs is a word": (2, "jobs", lambda p: ["run", p.fast, "--run-dir", p.new, "--jobs", "all"]),
    "unknown recipe": (2, "did you mean 'digits'", lambda p: ["plan", "digit"]),
    "no recipe file": (2, "no such recipe file", lambda p: ["plan", p.folder / "x.toml"]),
    "recipe is a folder": (
        2,
        "no such recipe file",
        lambda p: ["plan", (p.folder / "d.toml").mkdir() or p.folder / "d.toml"],
    ),
    "recipe is no toml": (2, "not valid TOML", lambda p: ["plan", p.recipe("[train")]),
    "recipe is binary": (2, "not valid TOML", lambda p: ["plan", p.recipe(b"\xff\x00")]),
    "recipe is empty": (2, "plan", lambda p: ["plan", p.recipe("")]),
    "unknown key": (2, "did you mean 'train.lr'", lambda p: ["plan", "digits", "--set", "train.lrr=1"]),
    "unknown table": (2, "unknown key 'trian'", lambda p: ["plan", p.recipe(PLAIN + "[trian]\nlr = 1.0\n")]),
    "wrong type": (2, "train.lr", lambda p: ["plan", "digits", "--set", "train.lr=fast"]),
    "no value": (2, "KEY=VALUE", lambda p: ["plan", "digits", "--set", "train.lr"]),
    "unsupported model": (2, "not supported", lambda p: ["plan", "imagenet-vit-b", "--set", "model.name=resnet50"]),
    "unknown model": (
        2,
        "did you mean",
        lambda p: ["plan", "imagenet-vit-b", "--set", "model.name=vit_bas_patch16_224"],
    ),
    "how many images": (2, "data.train_samples", lambda p: ["plan", p.recipe(PLAIN)]),
    "too large a batch": (2, "batch_size", lambda p: ["plan", p.fast, "--set", "train.batch_size=100000"]),
    "unknown phase": (2, "pretrain, incubate", lambda p: p.train(p.new, "cook")),
    "no module": (2, "--module 0 to 1", lambda p: p.train(p.new, "incubate")),
    "no such module": (2, "--module 0 to 1", lambda p: p.train(p.new, "incubate", "--module", 2)),
    "module is a word": (2, "expected a number", lambda p: p.train(p.new, "incubate", "--module", "one")),
    "module is negative": (2, "module", lambda p: p.train(p.new, "incubate", "--module", "-1")),
    "module without incubation": (2, "only for --phase incubate", lambda p: p.train(p.new, "pretrain", "--module", 1)),
    "not in an array": (2, "SLURM_ARRAY_TASK_ID", lambda p: p.train(p.new, "incubate", "--module", "auto")),
    "another experiment": (
        2,
        "train.lr: 0.002 -> 0.5",
        lambda p: [*p.train(p.run, "pretrain"), "--set", "train.lr=0.5"],
    ),
    "run directory is a file": (2, "is a file", lambda p: p.train(p.file, "pretrain")),
    "run: directory is a file": (2, "is a file", lambda p: ["run", p.fast, "--run-dir", p.file]),
    "other classes": (2, "10 classes", lambda p: [*p.train(p.new, "pretrain"), "--set", "model.num_classes=11"]),
    "other number of images": (
        2,
        "train_samples",
        lambda p: [*p.train(p.new, "pretrain"), "--set", "data.train_samples=5"],
    ),
    "long warm-up": (2, "warmup_epochs", lambda p: [*p.train(p.new, "pretrain"), "--set", "schedule.warmup_epochs=9"]),
    "unknown optimizer": (
        2,
        "optim.name = 'adamx'",
        lambda p: [*p.train(p.new, "pretrain"), "--set", "optim.name=adamx"],
    ),
    "odd micro-batch": (2, "micro_batch", lambda p: [*p.train(p.new, "pretrain"), "--set", "train.micro_batch=3"]),
    "run's recipe is damaged": (
        2,
        "recipe.toml: not valid TOML",
        lambda p: p.train(p.spoiled("recipe.toml", "["), "pretrain"),
    ),
    "export onto a file": (2, "--out", lambda p: ["export", p.run, "--out", p.file]),
    "export onto something": (2, "--out", lambda p: ["export", p.run, "--out", p.folder]),
    "convert onto something": (2, "exists", lambda p: ["checkpoint", "convert", p.run / META, p.empty]),
    "convert for no ranks": (2, "ranks", lambda p: ["checkpoint", "convert", p.run / META, p.new, "--ranks", 0]),
    "a fraction of two": (
        2,
        "val-fraction",
        lambda p: ["data", "prepare", "digits", "--out", p.new, "--val-fraction", 2],
    ),
    # ------------------------------------------------------------------------ 3: data and environment
    "no data": (
        3,
        "bigincubate data prepare SOURCE --out",
        lambda p: ["train", p.recipe(PLAIN), "--run-dir", p.new, "--phase", "pretrain"],
    ),
    "no data there": (
        3,
        "bigincubate data prepare SOURCE --out",
        lambda p: [*p.train(p.new, "pretrain"), "--set", "data.path=/nowhere"],
    ),
    "data is a file": (3, "data", lambda p: [*p.train(p.new, "pretrain"), "--set", f"data.path={p.file}"]),
    "plan with no data there": (
        3,
        "no such folder; prepare it with: bigincubate data prepare SOURCE --out '",
        lambda p: ["plan", p.recipe(PLAIN), "--set", f"data.path={p.folder / 'my data'}"],
    ),
    "evaluate on no data": (3, "bigincubate data prepare", lambda p: ["evaluate", p.run, "--data", p.empty]),
    "evaluate on a file": (3, "data", lambda p: ["evaluate", p.run, "--data", p.file]),
    "run directory below a file": (3, "Not a directory", lambda p: p.train(p.file / "run", "pretrain")),
    "phase's folder is a file": (
        3,
        "modules/00",
        lambda p: p.train(p.without("modules/00") and p.spoiled("modules/00", ""), "incubate", "--module", 0),
    ),
    "prepare nothing": (3, "nowhere", lambda p: ["data", "prepare", p.folder / "nowhere", "--out", p.new]),
    "prepare onto something": (3, "holds other files", lambda p: ["data", "prepare", "digits-dev", "--out", p.folder]),
    # ------------------------------------------------------------------------ 4: artifacts
    "modules before the meta model": (4, "--phase pretrain", lambda p: p.train(p.new, "incubate", "--module", 0)),
    "fine-tuning before the modules": (
        4,
        "--phase incubate --module 1",
        lambda p: p.train(p.without("modules/01", "finetune", "assembled"), "finetune"),
    ),
    "damaged manifest": (
        4,
        "modules/00/artifact",
        lambda p: p.train(p.without("finetune") and p.spoiled("modules/00/artifact/manifest.json", "{"), "finetune"),
    ),
    "damaged weights": (
        4,
        "weights.safetensors",
        lambda p: p.train(
            p.without("finetune") and p.spoiled("modules/00/artifact/weights.safetensors", "x"), "finetune"
        ),
    ),
    "damaged meta model": (
        4,
        "weights.safetensors",
        lambda p: p.train(
            p.without("modules") and p.spoiled("meta/artifact/weights.safetensors", "x"), "incubate", "--module", 0
        ),
    ),
    "evaluate nothing": (4, "no such directory", lambda p: ["evaluate", p.folder / "nowhere", "--data", p.digits]),
    "evaluate a file": (4, "no artifact", lambda p: ["evaluate", p.file, "--data", p.digits]),
    "evaluate an empty folder": (4, "no artifact", lambda p: ["evaluate", p.empty, "--data", p.digits]),
    "evaluate a module": (
        4,
        "is module 1, a part of a model",
        lambda p: ["evaluate", p.run / "modules" / "01", "--data", p.digits],
    ),
    "evaluate an unfinished run": (
        4,
        "no finished model",
        lambda p: ["evaluate", p.without("finetune"), "--data", p.digits],
    ),
    "evaluate a damaged manifest": (
        4,
        "manifest.json",
        lambda p: ["evaluate", p.spoiled("finetune/artifact/manifest.json", "{}"), "--data", p.digits],
    ),
    "evaluate damaged weights": (
        4,
        "damaged",
        lambda p: ["evaluate", p.spoiled("finetune/artifact/weights.safetensors", "x"), "--data", p.digits],
    ),
    "export nothing": (4, "no such directory", lambda p: ["export", p.folder / "nowhere", "--out", p.new]),
    "export a module": (4, "is module 0", lambda p: ["export", p.run / "modules" / "00", "--out", p.new]),
    "status of nothing": (4, "not a run directory", lambda p: ["status", p.folder / "nowhere"]),
    "status of a file": (4, "not a run directory", lambda p: ["status", p.file]),
    "status of an empty folder": (4, "not a run directory", lambda p: ["status", p.empty, "--json"]),
    "status without a plan": (4, "nothing has run", lambda p: ["status", p.without("plan.json")]),
    "status of a damaged plan": (4, "plan.json is damaged", lambda p: ["status", p.spoiled("plan.json", "{}")]),
    "checkpoints of nothing": (4, "no such directory", lambda p: ["checkpoint", "list", p.folder / "nowhere"]),
    "checkpoints of an empty folder": (4, "no checkpoints in", lambda p: ["checkpoint", "list", p.empty]),
    "verify what was not committed": (
        4,
        "no committed checkpoint",
        lambda p: ["checkpoint", "verify", p.without(f"{META}/COMMITTED") / META],
    ),
    "convert what was not committed": (
        4,
        "not a committed checkpoint",
        lambda p: ["checkpoint", "convert", p.without(f"{META}/COMMITTED") / META, p.new],
    ),
    "convert a run": (4, "not a committed checkpoint", lambda p: ["checkpoint", "convert", p.run, p.new]),
    # ------------------------------------------------------------------------ 6: checkpoints
    "verify a damaged checkpoint": (
        6,
        "state.json: 1 bytes, expected",
        lambda p: ["checkpoint", "verify", p.spoiled(f"{META}/state.json", "x")],
    ),
    "convert a damaged checkpoint": (
        6,
        "state.json: 1 bytes, expected",
        lambda p: ["checkpoint", "convert", p.spoiled(f"{META}/state.json", "x") / META, p.new],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gives_one_line_and_a_documented_code(name: str, place: Any, call: Called) -> None:
    code, says, words = WRONG[name]
    found, _, err = call(*words(place))
    assert (found, err.count("\n")) == (code, 1), err
    assert err.startswith("bigincubate: ")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is outside WORLD_SIZE=2"),
    ],
)
def test_contradictory_environment_gives_one_line(
    variables: dict[str, str], says: str, place: Any, call: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    code, _, err = call(*place.train(place.new, "pretrain"))
    assert code == 2
    assert says in err


def test_module_auto_takes_the_array_index(place: Any, call: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    code, out, err = call(*place.train(place.without("modules/01"), "incubate", "--module", "auto"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("module 1: done, top-1 ")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "x")
    code, _, err = call(*place.train(place.run, "incubate", "--module", "auto"))
    assert code == 2
    assert "SLURM_ARRAY_TASK_ID is 'x'" in err
    assert err.count("\n") == 1


def test_command_named_by_an_error_fixes_it(place: Any, call: Called) -> None:
    """From nothing to fine-tuning, led by the errors alone."""
    wanted = place.train(place.new, "finetune")
    made = []
    for _ in range(10):
        code, _, err = call(*wanted)
        if code == 0:
            break
        assert code == 4
        command = err.partition("with: bigincubate ")[2].split()
        made.append(command[command.index("--phase") + 1])
        assert call(*command)[0] in (0, 4)
        if call(*command)[0] == 4:
            command = call(*command)[2].partition("with: bigincubate ")[2].split()
            assert call(*command)[0] == 0
    assert code == 0
    assert made.count("incubate") == 2 or "pretrain" in made


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00\xff"])
def test_damaged_run_files_are_written_again(text: str, place: Any, call: Called) -> None:
    expected = json.loads((place.run / "meta" / "DONE").read_text())
    for name in ("meta/DONE", "plan.json", "meta/attempts/1.json", "meta/owners/1.json", "summary.json"):
        place.spoiled(name, text)
    code, _, err = call(*place.train(place.run, "pretrain"))
    assert (code, err) == (0, "")
    assert {**json.loads((place.run / "meta" / "DONE").read_text()), "seconds": 0} == {**expected, "seconds": 0}
    assert call("status", place.run)[0] == 0


@pytest.mark.parametrize("words", [[], ["data"], ["checkpoint"]])
def test_command_without_a_subcommand_prints_its_help_and_no_empty_message(words: list[str], call: Called) -> None:
    code, out, err = call(*words)
    assert code == 2
    assert "Usage:" in out + err
    assert "bigincubate:  (see --help)" not in out + err
