"""`kill -9` and stop signals at seeded random moments, then the same command again: the same bits in the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, fork_ranks
from trial_log import FULL, ROOT, Trial, TrialLog

Harnesses = Callable[..., Any]
STEPS, EVERY = 24, 3
SETS = [
    *("mixup.mixup=0.4", "mixup.cutmix=1.0", "drop_path.rate=0.3", "ema.decay=0.9", "loss.label_smoothing=0.1"),
    *(f"train.max_steps={STEPS}", "log.every_steps=1", f"checkpoint.every_steps={EVERY}", "augment.erase=0.3"),
]
PHASES: list[tuple[str, int | None]] = [("pretrain", None), ("incubate", 1), ("finetune", None)]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Runs:
    """A finished run, and copies of it that lack one phase."""

    def __init__(self, harness: Harnesses, folder: Path, world: int) -> None:
        self.world, self.folder = world, folder
        self.harness = harness(*SETS)
        if world == 1:
            for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
                self.harness.train(phase, module)
        else:
            assert self.command(self.harness, "pretrain", None).wait(600) == 0

    def without(self, name: str, phase: str, module: int | None) -> Any:
        other = self.harness.copy(self.folder / name)
        shutil.rmtree(other.run.phase(phase, module).path)
        if phase == "finetune":
            shutil.rmtree(other.run.assembled.path)
        return other

    def command(self, harness: Any, phase: str, module: int | None) -> Command:
        """One process, or a launcher of ranks: of this run that phase alone is left to do."""
        if self.world == 1:
            return Command(*harness.command(phase, module))
        words = ["run", harness.run.recipe_file, "--run-dir", harness.run.path, "--jobs", 1, "--nproc", self.world]
        return Command(*words, before=fork_ranks)

    def check_same(self, other: Any, phase: str, module: int | None) -> None:
        own, found = (harness.run.phase(phase, module) for harness in (self.harness, other))
        expected, weights = (harness.weights(phase, module) for harness in (self.harness, other))
        assert expected.keys() == weights.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items()), "other weights"
        results = [{k: v for k, v in folder.result.items() if k != "seconds"} for folder in (own, found)]
        assert results[0] == results[1]
        losses = [
            [(row["step"], row["train/loss"]) for row in harness.log(phase, module)]
            for harness in (self.harness, other)
        ]
        assert losses[0] == losses[1], "another log"
        states = []
        for folder in (own, found):
            manifest = json.loads((folder.checkpoints / f"step-{STEPS:08d}" / "manifest.json").read_text())
            states.append({name: entry for name, entry in manifest["files"].items() if name != "state.json"})
        assert states[0] == states[1], "another state of the optimizer"


@pytest.fixture(scope="module")
def runs(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Runs]:
    made: dict[int, Runs] = {}

    def get(world: int) -> Runs:
        if world not in made:
            made[world] = Runs(harness, tmp_path_factory.mktemp(f"world-{world}"), world)
        return made[world]

    return get


def committed(folder: Any) -> int:
    return max((int(path.parent.name[5:]) for path in folder.checkpoints.glob("step-*/COMMITTED")), default=0)


def logged(harness: Any, phase: str, module: int | None) -> int:
    return max((row["step"] for row in harness.log(phase, module)), default=0)


def trainers(folder: Any) -> list[int]:
    """Of the ranks that train there, by rank: they write its logs."""
    found = {}
    for log in sorted((folder.path / "logs").glob("train*.log")):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "fd" / "1").resolve() == log.resolve():
                    found[log.name] = int(process.name)
            except OSError:
                continue
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]


class Cold:
    """A process that starts from nothing."""

    def __init__(self, words: list[object]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bigincubate", *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid = self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> int:
        self.process.kill()
        return self.process.wait()

    until = Command.until


def wait_for_the_moment(
    trial: Trial, command: Any, harness: Any, phase: str, module: int | None, in_save: bool
) -> bool:
    """A random one while the phase runs: in a save, or anywhere. Whether a save is under way."""
    folder, dice = harness.run.phase(phase, module), trial.random
    step = dice.randrange(1, STEPS - EVERY)
    command.until(lambda: logged(harness, phase, module) >= step)
    if in_save:
        seen: set[Path] = set()
        begun = set(folder.checkpoints.glob(".saving-*"))

        def saving() -> bool:
            seen.update(set(folder.checkpoints.glob(".saving-*")) - begun)
            return bool(seen)

        command.until(saving, pause=0)
        time.sleep(dice.uniform(0, 0.01))
    else:
        time.sleep(dice.uniform(0, 0.2))
    return bool(list(folder.checkpoints.glob(".saving-*")))


def attack(trial: Trial, runs: Callable[[int], Runs]) -> None:
    number, dice = trial.number, trial.random
    phase, module = PHASES[number % 3]
    whom = ("process", "rank", "process", "launcher", "process", "ranks")[number % 6 if FULL else 2 * (number % 3)]
    cold = FULL and number % 10 == 4 and whom == "process"
    cold = cold or (FULL and whom == "process" and number % 7 == 0)
    run = runs(1 if whom == "process" else 2)
    other = run.without(f"kill-{number}", phase, module)
    folder = other.run.phase(phase, module)
    trial.note(**{phase: 1, {"process": "processes", "launcher": "launchers"}.get(whom, "ranks"): 1})
    trial.note(cold=int(cold))
    command: Any = Cold(other.command(phase, module)) if cold else run.command(other, phase, module)
    inside = wait_for_the_moment(trial, command, other, phase, module, in_save=(number // 3) % 2 == 0)
    pids = trainers(folder) if whom != "process" else []
    for pid in {"process": [], "launcher": [], "rank": [dice.choice(pids or [0])], "ranks": pids}[whom]:
        if pid:
            os.kill(pid, signal.SIGKILL)
    if whom in ("process", "launcher"):
        command.kill()
    else:
        command.wait()
    until = time.monotonic() + 60
    while whom == "launcher" and trainers(folder):  # they save and leave by themselves
        assert time.monotonic() < until, "ranks outlived their launcher"
        time.sleep(0.05)
    lost = 0 if folder.result else logged(other, phase, module) - committed(folder)
    assert lost < 2 * EVERY, f"{lost} steps lost"
    trial.note(**{"killed_inside_a_save": int(inside), "steps_lost": lost})
    again = run.command(other, phase, module)
    assert again.wait(300) == 0, again.err
    run.check_same(other, phase, module)
    shutil.rmtree(other.run.path)


@pytest.mark.scenario("kill")
def test_run_killed_at_any_moment_ends_with_the_same_bits(trial_log: TrialLog, runs: Callable[[int], Runs]) -> None:
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            attack(trial, runs)
    trial_log.check()


def stop(trial: Trial, run: Runs) -> None:
    number, dice = trial.number, trial.random
    phase, module = PHASES[number % 3]
    other = run.without(f"stop-{number}", phase, module)
    folder = other.run.phase(phase, module)
    command = run.command(other, phase, module)
    wait_for_the_moment(trial, command, other, phase, module, in_save=number % 2 == 0)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        if command.running:
            command.send(dice.choice(SIGNALS))
    code = command.wait()
    trial.note(stopped=int(code == 75), finished_before=int(code == 0))
    assert code in (0, 75) or folder.result, command.err
    if code == 75:
        assert committed(folder) == logged(other, phase, module), "a step was lost"
    again = run.command(other, phase, module)
    assert again.wait(300) == 0, again.err
    run.check_same(other, phase, module)
    shutil.rmtree(other.run.path)


@pytest.mark.scenario("signal")
def test_run_stopped_by_any_signal_ends_with_the_same_bits(trial_log: TrialLog, runs: Callable[[int], Runs]) -> None:
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            stop(trial, runs(1))
    trial_log.check()
