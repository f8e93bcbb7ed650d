"""`bigincubate fork`: a new run takes over what a changed recipe leaves valid, and nothing is shared that changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from denied import deny, solution_for

import bigincubate as bi
from bigincubate import files
from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError, LockedError
from bigincubate.planning import fork_run as forks
from bigincubate.planning.context import open_run
from bigincubate.planning.fork_run import ForkedPhase, describe_fork, fork_run
from bigincubate.report.page import render_report
from bigincubate.report.run_data import read_run
from bigincubate.report.verify import Verdict, verify_run
from bigincubate.storage.artifacts import load_artifact
from bigincubate.storage.lease import acquire_lease
from bigincubate.storage.run_directory import RunDir
from bigincubate.training.import_official import import_part

Called = Callable[..., tuple[int, str, str]]
Harnesses = Callable[..., Any]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the content and the time of the last change of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def taken(phases: tuple[ForkedPhase, ...]) -> dict[str, bool]:
    return {phase.key: phase.taken for phase in phases}


def recipe_of(run: Any, *sets: str) -> bi.Recipe:
    return load_recipe(str(run.run.recipe_file), sets)


def test_three_fine_tunings_of_the_same_modules_are_three_forks(
    done: Any, harness: Harnesses, tmp_path: Path, call: Called
) -> None:
    before = contents(done.run.path)
    meta = done.run.phase("pretrain").artifact / "weights.safetensors"
    for steps in (1, 3, 4):
        folder = tmp_path / f"fine-{steps}"
        code, out, err = call("fork", done.run.path, folder, "--set", f"finetune.train.max_steps={steps}")
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0] == f"{folder}: forked from {done.run.path}"
        assert lines[1:4] == [
            f"  {title:<11}  taken over: finished" for title in ("meta model", "module 0", "module 1")
        ]
        assert lines[4] == f"  fine-tuning  to be trained: finetune.train.max_steps: null -> {steps}"
        assert "hard link" in lines[5]
        assert lines[6] == f"next:    bigincubate run {folder / 'recipe.toml'} --run-dir {folder}"
        assert (folder / "meta" / "artifact" / "weights.safetensors").samefile(meta)
        made = harness("train.max_steps=2", "log.every_steps=1", f"finetune.train.max_steps={steps}", folder=folder)
        assert made.train("finetune")["steps"] == steps
        for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1)):
            old, new = done.weights(phase, module), made.weights(phase, module)
            assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
        assert {finding.verdict for finding in verify_run(made.run)} == {Verdict.GOOD}
        code, out, _ = call("status", folder, "--json")
        assert [row["state"] for row in json.loads(out)] == ["done"] * 4
        assert f"forked from {done.run.path}" in render_report(read_run(made.run), list(verify_run(made.run)))
        assert made.run.update_summary()["modules"] == done.run.update_summary()["modules"]
    assert contents(done.run.path) == before


def test_name_changes_nothing_and_a_setting_of_all_phases_everything(done: Any, tmp_path: Path) -> None:
    renamed = fork_run(done.run, RunDir(tmp_path / "renamed"), recipe_of(done, 'name="renamed"'))
    assert taken(renamed.phases) == dict.fromkeys(["pretrain", "incubate/0", "incubate/1", "finetune"], True)
    assert {finding.verdict for finding in verify_run(renamed.run)} == {Verdict.GOOD}
    assert renamed.run.load_recipe().name == "renamed"
    with pytest.raises(
        ConfigError, match=r"no phase of .* stays valid \(meta model: train.lr: 0.002 -> 0.5; module 0: "
    ):
        fork_run(done.run, RunDir(tmp_path / "other"), recipe_of(done, "train.lr=0.5"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["renamed"]


def test_phase_that_reads_a_phase_to_be_trained_is_not_taken(done: Any, tmp_path: Path) -> None:
    made = fork_run(done.run, RunDir(tmp_path / "new"), recipe_of(done, "incubate.train.lr=0.5"))
    assert [(phase.taken, phase.reason) for phase in made.phases] == [
        (True, "finished"),
        (False, "incubate.train.lr: null -> 0.5"),
        (False, "incubate.train.lr: null -> 0.5"),
        (False, "needs module 0, module 1"),
    ]
    assert not (tmp_path / "new" / "modules").exists()
    assert not (tmp_path / "new" / "assembled").exists()


def test_checkpoints_of_an_unfinished_phase_are_taken_and_never_changed(
    harness: Harnesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = harness("train.max_steps=8", "log.every_steps=2")
    one.train("pretrain")
    reference = one.weights("pretrain")
    folder = one.run.phase("pretrain")
    for path in (folder.path / "DONE", *folder.checkpoints.glob("step-00000008/*")):
        path.unlink()
    shutil.rmtree(folder.artifact)
    (folder.checkpoints / "step-00000008").rmdir()
    before = contents(one.run.path)
    made = fork_run(one.run, RunDir(tmp_path / "new"), recipe_of(one, "finetune.train.lr=0.5"))
    assert made.phases[0] == ForkedPhase("pretrain", "meta model", True, "unfinished, from step 4")
    assert made.phases[1].reason == "needs meta model"
    other = harness("train.max_steps=8", "log.every_steps=2", "finetune.train.lr=0.5", folder=tmp_path / "new")
    assert other.train("pretrain")["steps"] == 8
    assert [row["step"] for row in other.log("pretrain")] == [2, 4, 6, 8]
    assert all(torch.equal(tensor, other.weights("pretrain")[name]) for name, tensor in reference.items())
    assert len(other.run.phase("pretrain").read_attempts()) == 2
    assert contents(one.run.path) == before


def unfinished(made: Any) -> Any:
    """The run with a meta model that has the checkpoints of steps 4 and 5, and is not finished."""
    made.train("pretrain")
    (made.run.phase("pretrain").path / "DONE").unlink()
    shutil.rmtree(made.run.phase("pretrain").artifact)
    return made


def test_damaged_checkpoint_is_left_out_with_a_warning(
    harness: Harnesses, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = unfinished(harness("train.max_steps=5"))
    checkpoints = one.run.phase("pretrain").checkpoints
    damaged = checkpoints / "step-00000005" / "manifest.json"
    damaged.write_bytes(b"damaged")
    made = fork_run(one.run, RunDir(tmp_path / "new"))
    assert made.phases[0] == ForkedPhase("pretrain", "meta model", True, "unfinished, from step 4")
    assert [path.name for path in made.run.phase("pretrain").checkpoints.iterdir()] == ["step-00000004"]
    assert f"damaged checkpoint, left out: {damaged}: " in caplog.text
    (checkpoints / "step-00000004" / "rank-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"\(meta model: every checkpoint is damaged; module 0: needs meta model\)"):
        fork_run(one.run, RunDir(tmp_path / "other"))


@pytest.mark.parametrize("denied", ["", "step-00000005", "step-00000005/manifest.json"])
def test_checkpoint_that_cannot_be_read_is_an_error(
    denied: str, harness: Harnesses, tmp_path: Path, call: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = unfinished(harness("train.max_steps=5"))
    path = one.run.phase("pretrain").checkpoints / denied
    deny(monkeypatch, path)
    file = path / "COMMITTED" if denied == "step-00000005" else path
    error = f"bigincubate: {file}: Permission denied; {solution_for(file, path)}\n"
    assert call("fork", one.run.path, tmp_path / "new") == (3, "", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("denied", ["meta/DONE", "modules/00/artifact", "finetune/checkpoints", "assembled/DONE"])
def test_finished_phase_that_cannot_be_read_is_an_error(
    denied: str, done: Any, tmp_path: Path, call: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(monkeypatch, done.run.path / denied)
    code, out, err = call("fork", done.run.path, tmp_path / "new")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert err.startswith(f"bigincubate: {done.run.path / denied}")
    assert list(tmp_path.iterdir()) == []


def test_files_are_copied_where_there_are_no_hard_links(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(files.os, "link", refuse)
    monkeypatch.setattr(RunDir, "create", lambda run, recipe: files.write_text(run.recipe_file, recipe.toml()))
    monkeypatch.setattr(forks, "ensure_plan", lambda recipe, run, data: (None, write_plan(run, done)))
    made = fork_run(done.run, RunDir(tmp_path / "new"))
    assert "hard links are not possible here" in describe_fork(made, done.run)[-1]
    weights = Path("meta") / "artifact" / "weights.safetensors"
    assert not (tmp_path / "new" / weights).samefile(done.run.path / weights)
    assert {finding.verdict for finding in verify_run(made.run)} == {Verdict.GOOD}


def write_plan(run: RunDir, done: Any) -> Any:
    """Write the plan of another run, which needs no lease and hence no hard link."""
    shutil.copyfile(done.run.path / "plan.json", run.path / "plan.json")
    return done.rows


# ------------------------------------------------------------------------------------------------ refused


def test_fork_of_a_run_that_is_trained_is_refused(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, env = done.run.phase("incubate", 1).path, done.context("pretrain").env
    with acquire_lease(folder, env), pytest.raises(LockedError, match=rf"{folder} is being trained by process"):
        fork_run(done.run, RunDir(tmp_path / "new"))
    copy = forks._Copier.copy_phase
    once: list[bool] = []

    def begin(copier: Any, *arguments: Any) -> None:
        copy(copier, *arguments)
        if not once:
            once.append(True)
            with acquire_lease(folder, env):
                pass

    monkeypatch.setattr(forks._Copier, "copy_phase", begin)
    with pytest.raises(LockedError, match="began to train while the run was being forked"):
        fork_run(done.run, RunDir(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_fork_that_is_interrupted_leaves_nothing(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at every copied file, and between the renames."""
    target = RunDir(tmp_path / "new")
    open_run(recipe_of(done, "train.lr=0.5"), target)  # nothing is trained there, so it may be replaced
    before = contents(tmp_path)
    calls: list[bool] = []
    copy, rename = forks._Copier.copy_file, Path.rename

    def interrupt(moment: int, original: Callable[..., Any]) -> Callable[..., Any]:
        calls.clear()

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(True)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return call

    for moment in (1, 5, 20):
        monkeypatch.setattr(forks._Copier, "copy_file", interrupt(moment, copy))
        with pytest.raises(KeyboardInterrupt):
            fork_run(done.run, target)
        assert contents(tmp_path) == before
    monkeypatch.setattr(forks._Copier, "copy_file", copy)
    for moment in (1, 2):
        monkeypatch.setattr(Path, "rename", interrupt(moment, rename))
        with pytest.raises(KeyboardInterrupt):
            fork_run(done.run, target)
        assert contents(tmp_path) == before
    monkeypatch.setattr(Path, "rename", rename)
    made = fork_run(done.run, target)
    assert all(phase.taken for phase in made.phases)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    rows = [json.loads(line)["event"] for line in (target.path / "events.jsonl").read_text().splitlines()]
    assert rows == ["created", "created", "forked"]


def test_wrong_directories_are_one_line(done: Any, place: Any, tmp_path: Path, call: Called) -> None:
    (place.empty / "notes.txt").write_text("mine")
    for code, says, words in (
        (4, "is not a run directory", ("fork", place.folder / "nowhere", place.new)),
        (2, "has trained phases", ("fork", done.run.path, place.run)),
        (2, "is inside of", ("fork", done.run.path, done.run.path)),
        (2, "is inside of", ("fork", done.run.path, done.run.path / "fork")),
        (2, "is a file", ("fork", done.run.path, place.file)),
        (2, "other files (notes.txt)", ("fork", done.run.path, place.empty)),
        (2, "did you mean 'train.lr'", ("fork", done.run.path, place.new, "--set", "train.lrr=1")),
        (3, "no data in /nowhere", ("fork", done.run.path, place.new, "--set", "data.path=/nowhere")),
    ):
        ended, out, err = call(*words)
        assert (ended, out, err.count("\n")) == (code, "", 1), (words, out, err)
        assert says in err
    assert (place.empty / "notes.txt").read_text() == "mine"


def test_refused_change_names_the_command_that_forks(done: Any, place: Any, call: Called) -> None:
    code, _, err = call(*place.train(place.run, "finetune"), "--set", "finetune.train.lr=0.5")
    assert code == 2
    assert f"bigincubate fork {place.run} NEW_RUN --set KEY=VALUE" in err


# ------------------------------------------------------------------------------------------------ other ways


def test_python_interface_forks_with_built_in_data(smoke: Path, tmp_path: Path, counted: None) -> None:
    from conftest import TrainingHarness

    one = TrainingHarness(smoke, tmp_path / "one", "train.max_steps=1")
    one.train("pretrain")
    made = bi.fork(tmp_path / "one", tmp_path / "two", recipe_of(one, "incubate.train.lr=0.1"))
    assert [(phase.taken, phase.reason) for phase in made.phases][:2] == [
        (True, "finished"),
        (False, "not trained yet"),
    ]
    shards = sorted((tmp_path / "one" / "data").rglob("*.mds"))
    assert shards
    assert all(shard.samefile(tmp_path / "two" / shard.relative_to(tmp_path / "one")) for shard in shards)
    assert os.stat(shards[0]).st_nlink == 2


def test_import_takes_the_finished_modules_of_a_run(done: Any, harness: Harnesses, place: Any) -> None:
    """Also modules of other settings, which a fork refuses; unfinished ones are trained as usual."""
    made = harness("train.max_steps=2", "incubate.train.lr=0.5")
    (place.run / "modules" / "01" / "DONE").unlink()
    for part, titles in (("meta", ["meta model"]), ("modules", ["module 0"])):
        imported = list(import_part(made.recipe, part, [place.run], made.run))  # type: ignore[arg-type]
        assert [context.row.title for context, _ in imported] == titles
    old, new = done.weights("incubate", 0), made.weights("incubate", 0)
    assert old.keys() == new.keys()
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    made.train("incubate", 1)
    made.train("finetune")
    assert {finding.verdict for finding in verify_run(made.run)} == {Verdict.GOOD}
    assert load_artifact(made.run.phase("incubate", 0).artifact)[1].identity["train.lr"] == 0.5


def test_import_of_a_run_without_finished_modules_is_refused(place: Any, fast: Path, call: Called) -> None:
    place.without("modules/00/DONE", "modules/01/DONE")
    words = ("import", fast, place.run, "--as", "modules", "--to", place.new)
    assert call(*words)[::2] == (4, f"bigincubate: {place.run} has no finished modules\n")
    code, _, err = call(*words[:3], "--as", "meta", "--to", place.new, "--set", "plan.meta_depths=[1,2]")
    assert (code, err.count("\n")) == (4, 1)
    assert "has modules of [1, 1] blocks, but the recipe's meta model has [1, 2]" in err
