"""The command line: what the small commands print."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import iterate_commands
from forked import Command, hold_step, run

from bigincubate import __version__
from bigincubate.cli.app import discard_unread_output, say
from bigincubate.cli.doctor_checks import PACKAGES
from bigincubate.config import list_shipped_recipes
from bigincubate.distributed import process_group
from bigincubate.errors import ConfigError
from bigincubate.planning import memory
from bigincubate.planning.context import open_run

ROOT = Path(__file__).parents[2]
Harnesses = Callable[..., Any]
Called = Callable[..., Any]


def test_help_and_version(call: Called) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for command in ("plan", "run", "train", "evaluate", "status", "export", "data", "checkpoint", "recipes", "doctor"):
        assert command in out
    assert call("--version")[:2] == (0, f"bigincubate {__version__}\n")
    assert call("train", "-h")[0] == 0


def test_plan_of_a_run_is_read_from_its_files(done: Any, call: Called, tmp_path: Path) -> None:
    run = done.copy(tmp_path / "run", []).run
    assert (run.path / "plan.json").exists()
    read = call("plan", run.recipe_file)
    assert read == call("plan", run.recipe_file, "--set", "data.workers=3")  # which does not affect results
    fewer = call("plan", run.recipe_file, "--set", "train.max_steps=1")
    (run.path / "plan.json").unlink()
    assert read == call("plan", run.recipe_file)
    assert fewer == call("plan", run.recipe_file, "--set", "train.max_steps=1") != read


def _drop_a_cost(plan: dict[str, Any]) -> None:
    del plan["rows"][0]["cost"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan.pop("rows"),
        lambda plan: plan.pop("end_to_end_flops"),
        lambda plan: plan.pop("data"),
        lambda plan: plan["rows"].pop(),
        lambda plan: plan["rows"].append("text"),
        lambda plan: plan.update(rows=None),
        _drop_a_cost,
    ],
)
def test_damaged_plan_of_a_run_is_computed_again(
    done: Any, call: Called, tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    run = done.copy(tmp_path / "run", []).run
    file = run.path / "plan.json"
    read, whole = call("plan", run.recipe_file), json.loads(file.read_text())
    damaged = json.loads(file.read_text())
    damage(damaged)
    file.write_text(json.dumps(damaged))
    assert call("plan", run.recipe_file) == read
    open_run(run.load_recipe(), run)
    assert json.loads(file.read_text()) == whole


def test_plan_estimates_memory_of_ranks_only_if_it_is_shown(call: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ConfigError("memory was estimated")

    monkeypatch.setattr(memory, "estimate_footprints", refuse)
    assert call("plan", "digits")[0] == 0
    for option in (["--sharding"], ["--world", "2"], ["--json"]):
        assert call("plan", "digits", *option)[2] == "bigincubate: memory was estimated\n"


def test_plan_prints_every_phase(call: Called) -> None:
    code, out, _ = call("plan", "digits", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["key"] for row in rows] == ["pretrain", *(f"incubate/{k}" for k in range(4)), "finetune", "end_to_end"]
    assert all(row["cost"]["trainable"] <= row["cost"]["parameters"] for row in rows)
    code, out, _ = call("plan", "digits")
    assert code == 0
    assert "module 3" in out
    assert re.search(r"incubation: [\d.]{3,6} TFLOPs in total", out)
    assert max(map(len, out.splitlines())) > 80  # not folded to a terminal that is not there


def test_recipes_lists_the_shipped_ones(call: Called) -> None:
    code, out, _ = call("recipes")
    assert code == 0
    for name, file in list_shipped_recipes().items():
        assert name in out
        assert str(file) in out


def test_doctor_checks_the_environment(call: Called) -> None:
    code, out, _ = call("doctor")
    checks = json.loads(call("doctor", "--json")[1])
    assert code == (0 if all(check["ok"] or not check["needed"] for check in checks) else 3)
    assert "torch" in out
    assert {check["name"] for check in checks} >= {"python", "torch", "timm", "mosaicml-streaming", "sbatch"}


def test_doctor_checks_the_packages_of_all_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = [requirement for name, own in extras.items() if name not in ("all", "dev") for requirement in own]
    assert {re.split("[<>=]", requirement)[0] for requirement in needed} <= PACKAGES.keys()


def test_evaluate_a_run_a_phase_an_artifact_and_an_export(place: Any, call: Called, done: Any) -> None:
    expected = done.run.phase("finetune").result
    assert call("export", place.run, "--out", place.new)[0] == 0
    for source in (place.run, place.run / "finetune", place.run / "finetune" / "artifact", place.new):
        code, out, err = call("evaluate", source, "--data", place.digits, "--json", "--batch-size", 100)
        assert (code, err) == (0, "")
        scores = json.loads(out)
        assert (scores["top1"], scores["samples"]) == (expected["metrics"]["top1"], expected["samples"])
        assert scores["loss"] == pytest.approx(expected["metrics"]["loss"], abs=1e-6)
    code, out, _ = call("evaluate", place.run, "--data", place.digits)
    assert re.match(
        r"top-1 [\d.]+% \([\d.]+ to [\d.]+\), top-5 [\d.]+% \([\d.]+ to [\d.]+\), loss [\d.]+ on \d+ images of ", out
    )


ALONE: dict[str, Callable[[Any], list[object]]] = {
    "evaluate": lambda p: ["evaluate", p.run, "--data", p.digits],
    "evaluate features": lambda p: ["evaluate", p.run, "--data", p.digits, "--probe", "knn"],
    "export": lambda p: ["export", p.run, "--out", p.new],
    "data prepare": lambda p: ["data", "prepare", "digits", "--out", p.new],
    "status": lambda p: ["status", p.run],
    "report": lambda p: ["report", p.run],
    "verify": lambda p: ["verify", p.run],
    "checkpoint verify": lambda p: ["checkpoint", "verify", p.run],
    "plan": lambda p: ["plan", p.fast],
    "run": lambda p: ["run", p.fast, "--run-dir", p.run, "--set", "train.max_steps=2", "--set", "log.every_steps=1"],
}


@pytest.mark.parametrize("name", ALONE)
def test_only_train_reads_the_environment_of_a_rank(
    name: str, place: Any, call: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an allocation of Slurm, variables describe ranks that do not run."""
    monkeypatch.setattr(process_group, "COLLECTIVE_LIMIT", timedelta(seconds=1))
    rank = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for variable, value in {**rank, **slurm, **address}.items():
        monkeypatch.setenv(variable, value)
    code, _, err = call(*ALONE[name](place))
    assert (code, err) == (0, "")
    assert os.environ["WORLD_SIZE"] == "4"


def test_evaluate_refuses_data_of_other_classes(place: Any, call: Called, tmp_path: Path) -> None:
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
    assert "2 classes, but model.num_classes = 10" in err


def test_export_prints_the_python_that_loads_it(place: Any, call: Called) -> None:
    code, out, _ = call("export", place.run, "--out", place.new)
    assert code == 0
    assert f"written to {place.new}" in out
    assert "timm.create_model('local-dir:" in out


def test_closed_pipe_gives_no_traceback() -> None:
    left = Command("recipes", before=close_stdout)
    assert left.wait() == 0
    assert left.err == ""


def close_stdout() -> None:
    """As ``| head -0`` does."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


# ------------------------------------------------------------------------------------------------ status


def test_status_at_every_stage(harness: Harnesses, call: Called) -> None:
    watched = harness(
        "log.every_steps=1", "train.max_steps=400", "checkpoint.every_steps=5", "finetune.train.max_steps=2"
    )

    def status() -> dict[str, Any]:
        code, out, err = call("status", watched.run.path, "--json")
        assert (code, err) == (0, "")
        assert call("status", watched.run.path)[0] == 0  # and the table of it
        return {row["phase"]: row for row in json.loads(out)}

    rows = status()
    assert {row["state"] for row in rows.values()} == {"waiting"}
    assert list(rows) == ["pretrain", "incubate/0", "incubate/1", "finetune"]  # no baseline was asked for
    assert (rows["pretrain"]["step"], rows["pretrain"]["steps"], rows["pretrain"]["checkpoint"]) == (0, 400, None)

    def has_checkpoint() -> bool:
        """A checkpoint is written in the background: it may be complete some steps later than it began."""
        return any(watched.run.phase("pretrain").checkpoints.glob("step-*/COMMITTED"))

    command = Command(*watched.command("pretrain"), before=partial(hold_step, 12))
    assert command.until(lambda: len(watched.log("pretrain")) > 8 and has_checkpoint())
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

    before = row["step"]
    command = Command(*watched.command("pretrain"), before=partial(hold_step, before + 7))
    assert command.until(lambda: watched.log("pretrain")[-1]["step"] > before + 5)
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    row = status()["pretrain"]
    assert (row["state"], row["attempts"], row["step"]) == ("preempted", 2, row["checkpoint"])

    assert run(*watched.command("finetune")).wait() == 4
    row = status()["finetune"]
    assert row["state"] == "failed"
    assert "the meta model is missing" in row["error"]

    quick = harness("train.max_steps=2", "log.every_steps=1")
    quick.train("pretrain")
    row = {row["phase"]: row for row in json.loads(call("status", quick.run.path, "--json")[1])}["pretrain"]
    assert (row["state"], row["step"], row["percent"], row["error"]) == ("done", 2, 100.0, None)
    assert row["metrics"] == quick.run.phase("pretrain").result["metrics"]
    assert (row["headline"], row["unit"]) == ("top1", "images")


def test_status_counts_steps_of_a_checkpoint_that_were_not_logged(place: Any, call: Called) -> None:
    """After Ctrl-C, the checkpoint is usually later than the last logged step."""
    place.without("meta/DONE", "meta/metrics.jsonl")
    row = json.loads(call("status", place.run, "--json")[1])[0]
    assert (row["checkpoint"], row["step"], row["percent"]) == (2, 2, 100.0)
    assert "2/2" in call("status", place.run)[1]


def test_logs_of_wrong_names_are_errors(place: Any, call: Called) -> None:
    for words, code, says in (
        (["logs", place.folder / "nowhere"], 4, "is not a run directory"),
        (["logs", place.empty], 4, "is not a run directory"),
        (["logs", place.run], 4, "no logs in"),
        (["logs", place.run, "--module", 1], 4, "of module 1"),
        (["logs", place.run, "--module", 7], 2, "this run has modules 0 to 1"),
    ):
        found, _, err = call(*words)
        assert (found, err.count("\n")) == (code, 1), err
        assert says in err


def test_commands_of_slurm_say_that_a_local_run_was_never_submitted(place: Any, call: Called) -> None:
    code, _, err = call("resume", place.run)
    assert code == 2
    assert f"was never submitted to Slurm; resume it here with: bigincubate run {place.run}/recipe.toml" in err
    assert call("resume", place.empty)[0] == 4
    code, out, _ = call("cancel", place.run)
    assert (code, out) == (0, "this run has no jobs in the queue\n")


def test_output_that_nobody_reads_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", None)  # as if the command was started with 2>&-
        with discard_unread_output():
            for _ in range(3):
                say("a line")
                print("an error", file=sys.stderr, flush=True)
        assert sys.stdout is stream
    with open("/dev/full", "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(OSError, match="No space left"), discard_unread_output():
            say("a line")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


INTERRUPTED = "bigincubate: interrupted; committed results and checkpoints are kept; run the same command again"


def start_python(code: str) -> subprocess.Popen[str]:
    """Start Python with the usual Ctrl-C, which is ignored if a shell started the tests in the background."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["bigincubate.errors", "bigincubate.cli", "typer"])
@pytest.mark.parametrize("entry", ["module", "script"])
def test_ctrl_c_during_imports_is_one_line(entry: str, moment: str) -> None:
    code = (
        "import os, runpy, sys\n"
        "class Press:\n  def find_spec(self, name, *_):\n"
        f"    if name == {moment!r}:\n      os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\nsys.argv = ['bigincubate', '--version']\n"
    )
    run_entry = {
        "module": "runpy.run_module('bigincubate', run_name='__main__', alter_sys=True)",
        "script": "from bigincubate.__main__ import main\nmain()",
    }
    child = start_python(code + run_entry[entry])
    assert (*child.communicate(timeout=120), child.returncode) == ("", f"{INTERRUPTED}\n", 130)


def test_ctrl_c_between_the_import_of_the_entry_point_and_its_call_is_one_line() -> None:
    child = start_python("from bigincubate.__main__ import main\nsignal.raise_signal(signal.SIGINT)\nmain()")
    assert (*child.communicate(timeout=120), child.returncode) == ("", f"{INTERRUPTED}\n", 130)


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_is_one_line_and_exit_130(place: Any, presses: int) -> None:
    """At any moment: while modules are imported, and in a command."""
    code = (
        "import os, sys, time, runpy; from pathlib import Path; from bigincubate import cli\n"
        "def sleep(*_):\n  print('ready', flush=True)\n  try:\n    time.sleep(60)\n"
        "  finally:\n    time.sleep(0.5)\n"
        "from bigincubate.report import status\nstatus.run_status = sleep\n"
        f"sys.argv = ['bigincubate', 'status', '--json', {str(place.run)!r}]\n"
        "runpy.run_module('bigincubate', run_name='__main__')"
    )
    child = start_python(code)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    for _ in range(presses):
        child.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    lines = [line for line in err.splitlines() if line]
    assert lines == [INTERRUPTED] or (presses == 3 and not lines)  # the third one ends the command at once


def test_status_watch_ends_with_ctrl_c(done: Any, call: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("bigincubate.cli.inspect.time.sleep", sleep)
    code, out, err = call("status", done.run.path, "--watch")
    assert (code, err, naps) == (0, "", [2, 2, 2])
    assert "fine-tuning" in out


@pytest.mark.parametrize("command", [" ".join(words) for words, _ in iterate_commands()])
def test_help_is_not_cut_at_80_columns(command: str, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(*command.split(), "--help")
    assert code == 0
    assert "…" not in out.replace("N,N,…", "").replace("DIR…", "").replace("=…", "")


def test_flops_of_a_column_have_the_unit_of_the_largest() -> None:
    from bigincubate.report.units import format_flops_column

    assert format_flops_column([2.5e9, 2.5e8, 0]) == ("GFLOPs", ["2.5", "0.25", "0"])
    assert format_flops_column([4.7381e19, 1e15]) == ("PFLOPs", ["47,381", "1"])
    assert format_flops_column([]) == ("FLOPs", [])
