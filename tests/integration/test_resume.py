"""Killed, stopped or damaged at any moment, and run again: in the end the same bits as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, die_at_write, die_before, hold_step, run

from bigincubate.storage import checkpoint_manager

Harnesses = Callable[..., Any]
STEPS = 24
SETS = [
    *("mixup.mixup=0.4", "mixup.cutmix=1.0", "drop_path.rate=0.3", "ema.decay=0.9", "loss.label_smoothing=0.1"),
    *(f"train.max_steps={STEPS}", "log.every_steps=1", "checkpoint.every_steps=3", "augment.erase=0.3"),
]
PHASES = [("pretrain", None), ("incubate", 1), ("finetune", None)]
each_phase = pytest.mark.parametrize(("phase", "module"), PHASES, ids=["pretrain", "incubate", "finetune"])


class Reference:
    """A run that nothing happened to, and copies of it as it was before each phase."""

    def __init__(self, harness: Harnesses, folder: Path, *sets: str) -> None:
        self.folder = folder
        self.before: dict[str, Any] = {}
        self.harness = harness(*SETS, *sets)
        for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
            self.before[phase] = self.harness.copy(folder / f"before-{phase}-{module}")
            self.harness.train(phase, module)

    def fresh(self, phase: str, name: str) -> Any:
        return self.before[phase].copy(self.folder / f"{phase}-{name}")


@pytest.fixture(scope="module")
def reference(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(harness, tmp_path_factory.mktemp("adamw"))


@pytest.fixture(scope="module")
def lamb_reference(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(harness, tmp_path_factory.mktemp("lamb"), "optim.name=lamb", 'incubate.export="ema"')


def check_same(other: Any, reference: Reference, phase: str, module: int | None) -> None:
    """Weights, optimizer state, averages, result and log are those of the uninterrupted run, each step once."""
    harness = reference.harness
    expected, found = harness.weights(phase, module), other.weights(phase, module)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    results = [each.run.phase(phase, module).result for each in (harness, other)]
    assert [result.pop("seconds") > 0 for result in results] == [True, True]
    assert results[0] == results[1]
    hashes = []
    for each in (harness, other):
        folder = each.run.phase(phase, module).checkpoints / f"step-{STEPS:08d}"
        files = json.loads((folder / "manifest.json").read_text())["files"]
        hashes.append({name: entry for name, entry in files.items() if name != "state.json"})
    assert hashes[0] == hashes[1]
    rows, own = harness.log(phase, module), other.log(phase, module)
    assert [row["step"] for row in own] == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in own] == [row["train/loss"] for row in rows]
    shown = other.events(phase, module)
    for tag in ("train/loss", "train/step: learning rate", "work/images per second"):
        assert [event.step for event in shown.Scalars(tag)] == list(range(1, STEPS + 1)), tag
    assert [event.step for event in shown.Scalars("val/top-1 (%)")] == [STEPS]
    progress = other.events(phase, module, fleet=True).Scalars("whole run/progress (%)")
    assert [event.step for event in progress] == [event.step for event in shown.Scalars("train/loss")]
    assert len(shown.Images("visual inputs/augmented")) == 1
    assert len(shown.Tensors("recipe/text_summary")) == 1


def attempts(harness: Any, phase: str, module: int | None = None) -> list[dict[str, Any]]:
    return harness.run.phase(phase, module).read_attempts()


def reached(harness: Any, step: int, phase: str, module: int | None = None) -> Callable[[], bool]:
    return lambda: any(row["step"] >= step for row in harness.log(phase, module))


# ------------------------------------------------------------------------------------------------ kill -9


def kill_at_random(other: Any, phase: str, module: int | None, seed: int, kills: int) -> None:
    """Kill often and anywhere: every other time exactly at a write.

    Moments are counted in writes, not in seconds. Each attempt makes more than 30 of them, also one that starts when no
    steps are left.
    """
    moments = random.Random(seed)
    for number in range(kills):
        delay = 0 if number % 2 else moments.uniform(0.001, 0.1)
        command = run(*other.command(phase, module), before=partial(die_at_write, moments.randrange(9, 26), delay))
        assert command.wait() == -signal.SIGKILL, command.err


@each_phase
def test_kill_9_at_random_moments(reference: Reference, phase: str, module: int | None) -> None:
    other = reference.fresh(phase, "killed")
    kill_at_random(other, phase, module, seed=PHASES.index((phase, module)), kills=5)
    last = run(*other.command(phase, module))
    assert last.wait() == 0, last.err
    check_same(other, reference, phase, module)
    states = [attempt["state"] for attempt in attempts(other, phase, module)]
    assert states == ["running"] * 5 + ["done"]
    assert [attempt["attempt"] for attempt in attempts(other, phase, module)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.full
@each_phase
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_random_moments_with_lamb_and_often(
    lamb_reference: Reference, phase: str, module: int | None, seed: int
) -> None:
    other = lamb_reference.fresh(phase, f"killed-{seed}")
    kill_at_random(other, phase, module, seed=seed, kills=8)
    assert run(*other.command(phase, module)).wait() == 0
    check_same(other, lamb_reference, phase, module)


def test_kill_9_with_lamb_and_averages_handed_on(lamb_reference: Reference) -> None:
    other = lamb_reference.fresh("incubate", "killed")
    for step in (5, 13):
        command = Command(*other.command("incubate", 1), before=partial(hold_step, step + 1))
        assert command.until(reached(other, step, "incubate", 1))
        assert command.kill() == -signal.SIGKILL
    assert run(*other.command("incubate", 1)).wait() == 0
    check_same(other, lamb_reference, "incubate", 1)


@pytest.mark.parametrize("moment", random.Random(0).sample(range(4, 60), 5))
def test_kill_9_before_any_write(reference: Reference, moment: int) -> None:
    other = reference.fresh("incubate", f"write-{moment}")
    died = run(*other.command("incubate", 1), before=partial(die_at_write, moment))
    assert died.wait() == -signal.SIGKILL
    last = run(*other.command("incubate", 1))
    assert last.wait() == 0, last.err
    check_same(other, reference, "incubate", 1)


@pytest.mark.parametrize(
    "place",
    [
        ("bigincubate.storage.run_directory", "PhaseDir.write_result"),
        ("bigincubate.training.trainer", "save_artifact"),
        ("bigincubate.training.trainer", "Trainer.finish"),
        ("bigincubate.training.trainer", "Trainer.finish_assembly"),
    ],
    ids=lambda place: place[1],
)
def test_kill_9_between_the_last_step_and_the_end(reference: Reference, place: tuple[str, str]) -> None:
    other = reference.fresh("finetune", place[1])
    assert run(*other.command("finetune"), before=partial(die_before, *place)).wait() == -signal.SIGKILL
    assert other.run.phase("finetune").result is None
    assert run(*other.command("finetune")).wait() == 0
    check_same(other, reference, "finetune", None)
    assert other.run.assembled.result == reference.harness.run.assembled.result


def test_kill_9_before_the_first_checkpoint_logs_no_step_twice(reference: Reference) -> None:
    other = reference.fresh("pretrain", "early")
    rare = ["--set", "checkpoint.every_steps=1000"]
    command = Command(*other.command("pretrain", None, *rare), before=partial(hold_step, 11))
    assert command.until(reached(other, 10, "pretrain"))
    assert command.kill() == -signal.SIGKILL
    assert run(*other.command("pretrain", None, *rare)).wait() == 0
    check_same(other, reference, "pretrain", None)


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2], ids=lambda n: n.name
)
def test_signal_means_checkpoint_and_exit_75(reference: Reference, number: signal.Signals) -> None:
    phase, module = PHASES[number % 3]
    other = reference.fresh(phase, number.name)
    command = Command(*other.command(phase, module), before=partial(hold_step, 8))
    assert command.until(reached(other, 7, phase, module))
    command.send(number)
    assert command.wait() == 75
    stopped = max(row["step"] for row in other.log(phase, module))
    assert 7 <= stopped < STEPS
    assert command.err.startswith("bigincubate: ")
    assert f"stopped at step {stopped} of {STEPS} with a checkpoint" in command.err
    assert command.err.count("\n") == 1
    assert [attempt["state"] for attempt in attempts(other, phase, module)] == ["preempted"]
    assert (other.run.phase(phase, module).checkpoints / f"step-{stopped:08d}" / "COMMITTED").exists()
    assert run(*other.command(phase, module)).wait() == 0
    assert [attempt["state"] for attempt in attempts(other, phase, module)] == ["preempted", "done"]
    check_same(other, reference, phase, module)


def test_signal_to_all_processes_of_a_job_step_ends_the_log_in_one_line(reference: Reference) -> None:
    """Slurm also sends it to the loader workers and to the process that tracks shared memory."""
    other = reference.fresh("pretrain", "step")
    words = map(str, other.command("pretrain", None, "--set", "data.workers=2", "--set", "train.max_steps=20000"))
    command = [sys.executable, "-m", "bigincubate", *words]
    rank = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not reached(other, 7, "pretrain")():
        assert rank.poll() is None
        time.sleep(0.01)
    os.killpg(rank.pid, signal.SIGUSR2)
    _, err = rank.communicate(timeout=120)
    assert (rank.returncode, err.count("\n")) == (75, 1), err
    assert " with a checkpoint" in err


def hold_step_and_signal_in_save() -> None:
    """Wait before step 5, and receive two more signals while the checkpoint after that of step 3 is being written."""
    hold_step(5)
    write = checkpoint_manager.write_sharded_tensors

    def signal_and_write(path: Path, shards: Any) -> dict[str, Any]:
        if not path.parent.name.startswith(".saving-00000003-"):
            for number in (signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        return write(path, shards)

    checkpoint_manager.write_sharded_tensors = signal_and_write


def test_second_signal_does_not_spoil_the_checkpoint_of_the_first(reference: Reference) -> None:
    other = reference.fresh("pretrain", "twice")
    command = Command(*other.command("pretrain"), before=hold_step_and_signal_in_save)
    assert command.until(reached(other, 4, "pretrain"))
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    stopped = other.log("pretrain")[-1]["step"]  # 4 if the signal came before the wait
    assert (other.run.phase("pretrain").checkpoints / f"step-{stopped:08d}" / "COMMITTED").exists()
    assert run(*other.command("pretrain")).wait() == 0
    check_same(other, reference, "pretrain", None)


def test_error_during_a_save_ends_after_the_save(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt, maybe in this process, must not find a directory that is still being written."""
    other = reference.fresh("pretrain", "error")
    failing = other.trainer("pretrain")
    write, step = checkpoint_manager.write_sharded_tensors, failing.step

    def write_slowly(*arguments: Any) -> dict[str, Any]:
        time.sleep(0.5)
        return write(*arguments)

    def fail(batch: Any) -> Any:
        if failing.state.step == 4:  # the checkpoint of step 3 is being written
            raise InterruptedError
        return step(batch)

    failing.step = fail
    monkeypatch.setattr(checkpoint_manager, "write_sharded_tensors", write_slowly)
    with pytest.raises(InterruptedError):
        failing.run()
    assert [path.name for path in failing.checkpoints.folder.iterdir()] == ["step-00000003"]
    assert failing.checkpoints.committed_steps() == [3]
    monkeypatch.undo()
    other.train("pretrain")
    check_same(other, reference, "pretrain", None)


def test_phase_that_is_done_is_done_at_once(reference: Reference) -> None:
    again = run(*reference.harness.command("pretrain"))
    assert again.wait() == 0
    assert len(attempts(reference.harness, "pretrain")) == 1


# ------------------------------------------------------------------------------------------------ damage


def stopped_at(other: Any, step: int, phase: str = "pretrain") -> Path:
    command = Command(*other.command(phase), before=partial(hold_step, step + 1))
    assert command.until(reached(other, step, phase))
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    folder: Path = other.run.phase(phase).checkpoints
    return folder


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def test_flipped_bit_is_named_and_training_goes_on_from_the_one_before(reference: Reference) -> None:
    other = reference.fresh("pretrain", "flipped")
    newest = sorted(stopped_at(other, 8).glob("step-*"))[-1]
    flip_a_bit(newest / "rank-00000.safetensors")
    last = run(*other.command("pretrain"))
    assert last.wait() == 0
    assert f"{newest / 'rank-00000.safetensors'}: SHA-256" in last.err
    check_same(other, reference, "pretrain", None)


def test_every_checkpoint_damaged_is_exit_6(reference: Reference) -> None:
    other = reference.fresh("pretrain", "all")
    folder = stopped_at(other, 8)
    for checkpoint in folder.glob("step-*"):
        flip_a_bit(checkpoint / "rank-00000.safetensors")
    last = run(*other.command("pretrain"))
    assert last.wait() == 6
    assert last.err.splitlines()[-1].startswith(f"bigincubate: every checkpoint in {folder} is damaged")
    assert attempts(other, "pretrain")[-1]["state"] == "failed"
    assert len(list(folder.glob("step-*"))) == 2  # evidence is kept


def test_log_line_cut_off_is_left_out(reference: Reference) -> None:
    other = reference.fresh("pretrain", "cut")
    stopped_at(other, 8)
    file = other.run.phase("pretrain").metrics
    cut = other.log("pretrain")[-1]["step"]
    file.write_bytes(file.read_bytes()[:-20])
    assert run(*other.command("pretrain")).wait() == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in range(1, STEPS + 1) if step != cut]


def test_damaged_result_is_made_again(reference: Reference) -> None:
    other = reference.harness.copy(reference.folder / "result")
    for text in ("{", "[]", "", '{"metrics": {"top1": 1.0}}', '{"metrics": 5, "steps": 10, "seconds": 1.0}'):
        (other.run.phase("pretrain").path / "DONE").write_text(text)
        assert run(*other.command("pretrain")).wait() == 0
        check_same(other, reference, "pretrain", None)
