"""The command line: exit codes that scripts rely on, errors in one line, and what the small commands say."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Command, run

from bigincubate import __version__
from bigincubate.cli import main
from bigincubate.config import list_shipped_recipes

Labs = Callable[..., Any]
Called = Callable[..., Any]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Called:
    """``call("plan", "digits")`` gives exit code, stdout and stderr; a traceback fails the test by itself."""

    def called(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bigincubate", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return called


@pytest.fixture(scope="module")
def done(lab: Labs) -> Any:
    """A finished run of two steps a phase."""
    made = lab("train.max_steps=2", "log.every_steps=1")
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        made.train(phase, module)
    made.run.update_summary()
    return made


class Place:
    """What a wrong command may name; made anew for each."""

    def __init__(self, folder: Path, fast: Path, digits: Path, done: Any) -> None:
        self.folder, self.fast, self.digits = folder, fast, digits
        self.run = folder / "run"
        shutil.copytree(done.run.path, self.run)
        self.new = folder / "new"
        self.file = folder / "file"
        self.file.write_text("a file")
        self.empty = folder / "empty"
        self.empty.mkdir()

    def recipe(self, text: str | bytes) -> Path:
        path = self.folder / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def spoiled(self, name: str, text: str) -> Path:
        (self.run / name).write_text(text)
        return self.run

    def without(self, *names: str) -> Path:
        for name in names:
            path = self.run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.run

    def train(self, run_dir: Path, phase: str, *more: object) -> list[object]:
        return ["train", self.fast, "--run-dir", run_dir, "--phase", phase, *more, "--set", "train.max_steps=2"]


@pytest.fixture
def place(tmp_path: Path, fast: Path, digits: Path, done: Any) -> Place:
    return Place(tmp_path, fast, digits, done)


PLAIN = "[model]\nname = 'vit_tiny_patch16_224'\n[plan]\ntarget_depths = [2]\nmeta_depths = [1]\n"
META = "meta/checkpoints/step-00000002"
Wrong = Callable[[Place], list[object]]
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
    "unknown key": (2, "did you mean 'lr'", lambda p: ["plan", "digits", "--set", "train.lrr=1"]),
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
    "module without incubation": (2, "incubate only", lambda p: p.train(p.new, "pretrain", "--module", 1)),
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
    "evaluate on no data": (3, "bigincubate data prepare", lambda p: ["evaluate", p.run, "--data", p.empty]),
    "evaluate on a file": (3, "data", lambda p: ["evaluate", p.run, "--data", p.file]),
    "run directory below a file": (3, "Not a directory", lambda p: p.train(p.file / "run", "pretrain")),
    "phase's folder is a file": (
        3,
        "modules/00",
        lambda p: p.train(p.without("modules/00") and p.spoiled("modules/00", ""), "incubate", "--module", 0),
    ),
    "prepare nothing": (3, "nowhere", lambda p: ["data", "prepare", p.folder / "nowhere", "--out", p.new]),
    "prepare onto something": (3, "other files", lambda p: ["data", "prepare", "digits-dev", "--out", p.folder]),
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
    "status of a damaged plan": (4, "nothing has run", lambda p: ["status", p.spoiled("plan.json", "{}")]),
    "checkpoints of nothing": (4, "no such directory", lambda p: ["checkpoint", "list", p.folder / "nowhere"]),
    "checkpoints of an empty folder": (4, "no checkpoints in", lambda p: ["checkpoint", "list", p.empty]),
    "verify what was not committed": (
        4,
        "ever committed",
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
def test_what_is_wrong_is_one_line_and_a_documented_code(name: str, place: Place, call: Called) -> None:
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
def test_an_environment_that_contradicts_itself(
    variables: dict[str, str], says: str, place: Place, call: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    code, _, err = call(*place.train(place.new, "pretrain"))
    assert code == 2
    assert says in err


def test_module_auto_takes_the_array_index(place: Place, call: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    code, out, err = call(*place.train(place.without("modules/01"), "incubate", "--module", "auto"))
    assert (code, err) == (0, "")
    assert out.startswith("module 1: done, top-1 ")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "x")
    code, _, err = call(*place.train(place.run, "incubate", "--module", "auto"))
    assert (code, err) == (2, "bigincubate: the environment variable SLURM_ARRAY_TASK_ID is 'x', not a number\n")


def test_the_command_that_an_error_names_mends_it(place: Place, call: Called) -> None:
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
def test_damaged_notes_of_a_run_are_made_again(text: str, place: Place, call: Called) -> None:
    expected = json.loads((place.run / "meta" / "DONE").read_text())
    for name in ("meta/DONE", "plan.json", "meta/attempts/1.json", "meta/owners/1.json", "summary.json"):
        place.spoiled(name, text)
    code, _, err = call(*place.train(place.run, "pretrain"))
    assert (code, err) == (0, "")
    assert {**json.loads((place.run / "meta" / "DONE").read_text()), "seconds": 0} == {**expected, "seconds": 0}
    assert call("status", place.run)[0] == 0


# ------------------------------------------------------------------------------------------------ what it says


def test_help_and_version(call: Called) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for command in ("plan", "run", "train", "evaluate", "status", "export", "data", "checkpoint", "recipes", "doctor"):
        assert command in out
    assert call("--version")[:2] == (0, f"bigincubate {__version__}\n")
    assert call("train", "-h")[0] == 0


def test_plan(call: Called) -> None:
    code, out, _ = call("plan", "digits", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["key"] for row in rows] == ["pretrain", *(f"incubate/{k}" for k in range(4)), "finetune", "end_to_end"]
    assert all(row["cost"]["trainable"] <= row["cost"]["parameters"] for row in rows)
    code, out, _ = call("plan", "digits")
    assert code == 0
    assert "module 3" in out
    assert re.search(r"incubation: .* PFLOPs in all", out)
    assert max(map(len, out.splitlines())) > 80  # not folded to a terminal that is not there


def test_recipes(call: Called) -> None:
    code, out, _ = call("recipes")
    assert code == 0
    for name, file in list_shipped_recipes().items():
        assert name in out
        assert str(file) in out


def test_doctor(call: Called) -> None:
    code, out, _ = call("doctor")
    checks = json.loads(call("doctor", "--json")[1])
    assert code == (0 if all(check["ok"] or not check["needed"] for check in checks) else 3)
    assert "torch" in out
    assert {check["name"] for check in checks} >= {"python", "torch", "timm", "mosaicml-streaming", "sbatch"}


def test_evaluate_a_run_a_phase_an_artifact_and_an_export(place: Place, call: Called, done: Any) -> None:
    expected = done.run.phase("finetune").result
    assert call("export", place.run, "--out", place.new)[0] == 0
    for source in (place.run, place.run / "finetune", place.run / "finetune" / "artifact", place.new):
        code, out, err = call("evaluate", source, "--data", place.digits, "--json", "--batch-size", 100)
        assert (code, err) == (0, "")
        scores = json.loads(out)
        assert (scores["top1"], scores["samples"]) == (expected["metrics"]["top1"], expected["samples"])
        assert scores["loss"] == pytest.approx(expected["metrics"]["loss"], abs=1e-6)
    code, out, _ = call("evaluate", place.run, "--data", place.digits)
    assert re.match(r"top-1 [\d.]+%, top-5 [\d.]+%, loss [\d.]+ on \d+ images of ", out)


def test_evaluating_on_data_of_other_classes_is_refused(place: Place, call: Called, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "tree" / name / f"{number}.png")
    code, out, err = call("data", "prepare", tmp_path / "tree", "--out", tmp_path / "pets", "--jobs", 1)
    assert (code, err) == (0, "")
    assert f"use it with --set data.path={tmp_path / 'pets'}" in out
    code, _, err = call("evaluate", place.run, "--data", tmp_path / "pets")
    assert code == 2
    assert "2 classes, the model 10" in err


def test_export_prints_the_python_that_loads_it(place: Place, call: Called) -> None:
    code, out, _ = call("export", place.run, "--out", place.new)
    assert code == 0
    assert f"written to {place.new}" in out
    assert "timm.create_model('vit_tiny_patch16_224', pretrained=True" in out


def test_a_reader_that_leaves_is_not_answered_with_a_traceback() -> None:
    left = Command("recipes", before=close_stdout)
    assert left.wait() == 1  # as everywhere where click reads the command line
    assert left.err == ""


def close_stdout() -> None:
    """As ``| head -0`` does."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


# ------------------------------------------------------------------------------------------------ status


def test_status_at_every_stage(lab: Labs, call: Called) -> None:
    watched = lab("log.every_steps=1", "train.max_steps=400", "checkpoint.every_steps=5", "finetune.train.max_steps=2")

    def status() -> dict[str, Any]:
        code, out, err = call("status", watched.run.path, "--json")
        assert (code, err) == (0, "")
        assert call("status", watched.run.path)[0] == 0  # and the table of it
        return {row["phase"]: row for row in json.loads(out)}

    rows = status()
    assert {row["state"] for row in rows.values()} == {"waiting"}
    assert list(rows) == ["pretrain", "incubate/0", "incubate/1", "finetune"]  # no baseline was asked for
    assert (rows["pretrain"]["step"], rows["pretrain"]["steps"], rows["pretrain"]["checkpoint"]) == (0, 400, None)

    command = Command(*watched.command("pretrain"))
    assert command.until(lambda: len(watched.log("pretrain")) > 8)
    row = status()["pretrain"]
    assert row["state"] == "running"
    assert 8 < row["step"] < 400
    assert 0 < row["percent"] < 100
    assert row["samples_per_sec"] > 0
    assert row["eta_seconds"] > 0
    assert row["loss"] > 0
    assert row["checkpoint"] >= 5

    command.kill()
    row = status()["pretrain"]
    assert (row["state"], row["eta_seconds"], row["attempts"]) == ("died", None, 1)

    command = Command(*watched.command("pretrain"))
    before = row["step"]
    assert command.until(lambda: watched.log("pretrain")[-1]["step"] > before + 5)
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    row = status()["pretrain"]
    assert (row["state"], row["attempts"], row["step"]) == ("preempted", 2, row["checkpoint"])

    assert run(*watched.command("finetune")).wait() == 4
    row = status()["finetune"]
    assert row["state"] == "failed"
    assert "the meta model is missing" in row["error"]

    quick = lab("train.max_steps=2", "log.every_steps=1")
    quick.train("pretrain")
    row = {row["phase"]: row for row in json.loads(call("status", quick.run.path, "--json")[1])}["pretrain"]
    assert (row["state"], row["step"], row["percent"], row["error"]) == ("done", 2, 100.0, None)
    assert row["metrics"] == quick.run.phase("pretrain").result["metrics"]
    assert (row["headline"], row["unit"]) == ("top1", "images")


def test_watching_ends_with_ctrl_c(done: Any, call: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("bigincubate.cli.inspect.time.sleep", sleep)
    code, out, err = call("status", done.run.path, "--watch")
    assert (code, err, naps) == (0, "", [2, 2, 2])
    assert "fine-tuning" in out
