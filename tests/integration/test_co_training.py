"""Co-training: modules share one loader, have the same bits as without it, and survive its end and each other's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, fork_ranks, hold_step, run

from bigincubate.storage.lease import process_start_time

Harnesses = Callable[..., Any]
MODULES = (0, 1)
STEPS = 60


def shell() -> None:
    """Set up a process group, phases that are forked instead of started, and a temporary folder of its own."""
    os.setpgrp()
    fork_ranks()
    tempfile.tempdir = None


def shell_with_held_steps() -> None:
    """Let module 1 be far ahead of module 0."""
    shell()
    hold_step(12, "incubate/0")
    hold_step(40, "incubate/1")


class CoTrained:
    """``run --co-train`` as a shell starts it, on a run with a trained meta model."""

    def __init__(self, harness: Any, folder: Path, *more: object, before: Callable[[], None] = shell) -> None:
        self.harness, self.temporary = harness, folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        words = ["run", harness.run.recipe_file, "--run-dir", harness.run.path, "--co-train", *more]
        self.command = Command(*words, before=before, env={"TMPDIR": str(self.temporary)})

    def until_step(self, step: int, *modules: int) -> None:
        def reached() -> bool:
            return all(any(row["step"] >= step for row in self.harness.log("incubate", module)) for module in modules)

        assert self.command.until(reached, pause=0.01), self.command.out + self.command.err

    def pid(self, module: int) -> int:
        return int(self.harness.run.phase("incubate", module).read_attempts()[-1]["pid"])

    @property
    def server_pid(self) -> int:
        """The child of the launcher that is not a module."""
        children = Path(f"/proc/{self.command.pid}/task/{self.command.pid}/children").read_text().split()
        (pid,) = set(map(int, children)) - {self.pid(module) for module in MODULES}
        return pid

    def log(self, module: int) -> str:
        return (self.harness.run.phase("incubate", module).path / "logs" / "train.log").read_text()

    @property
    def served(self) -> list[tuple[int, int]]:
        """Batches made and sent, one pair per server that ended by itself."""
        lines = (self.harness.run.path / "events.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event["event"] == "shared_loader"]
        return [(event["made"], event["sent"]) for event in events]

    def leaves_no_shared_memory(self) -> bool:
        """Whether no claim is left: a claim file stands for a data set's shared memory and is removed with it."""
        (folder,) = self.temporary.iterdir()
        return not list(folder.glob("*.claim"))


@pytest.fixture(scope="module")
def plain(harness: Harnesses) -> Any:
    """A run trained without co-training."""
    sets = ("log.every_steps=2", "checkpoint.every_steps=20", "finetune.train.max_steps=2")
    done = harness(f"train.max_steps={STEPS}", *sets)
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        done.train(phase, module)
    return done


@pytest.fixture
def other(plain: Any, tmp_path: Path) -> Any:
    """The same run after training its meta model only."""
    copy = plain.copy(tmp_path / "run", ["meta"])
    (copy.run.path / "summary.json").unlink(missing_ok=True)
    return copy


def same_weights(one: Any, two: Any, *modules: int) -> bool:
    pairs = [(one.weights("incubate", module), two.weights("incubate", module)) for module in modules]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


OWN_LOADER = "using this module's own loader"


def test_co_training_gives_the_same_weights_from_batches_made_once(plain: Any, other: Any, tmp_path: Path) -> None:
    done = CoTrained(other, tmp_path)
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    assert done.served == [(STEPS, 2 * STEPS)]
    assert OWN_LOADER not in done.log(0) + done.log(1)
    assert done.leaves_no_shared_memory()
    again = CoTrained(other, tmp_path)
    assert again.command.wait() == 0
    assert again.served == [(STEPS, 2 * STEPS)]  # no server was started again


def test_co_training_two_ranks_have_one_server_each(harness: Harnesses, tmp_path: Path) -> None:
    plain = harness("train.max_steps=6", "data.workers=1", "finetune.train.max_steps=0")
    plain.train("pretrain")
    other = plain.copy(tmp_path / "run")
    apart = Command("run", plain.run.recipe_file, "--run-dir", plain.run.path, "--nproc", 2, before=shell)
    done = CoTrained(other, tmp_path, "--nproc", 2)
    assert apart.wait() == 0, apart.out + apart.err
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    logs = [
        (other.run.path / "modules" / "logs" / name).read_text()
        for name in ("shared_loader.log", "shared_loader.1.log")
    ]
    assert logs == ["6 batches made, 12 sent\n"] * 2
    assert done.leaves_no_shared_memory()


def test_co_training_with_one_of_three_modules_incubated(harness: Harnesses, tmp_path: Path) -> None:
    depths = ("plan.target_depths=[2, 2, 2]", "plan.meta_depths=[1, 1, 1]", "plan.incubate=[1]")
    plain = harness("train.max_steps=6", "finetune.budget=epochs", *depths)
    plain.train("pretrain")
    other = plain.copy(tmp_path / "run")
    plain.train("incubate", 1)
    done = CoTrained(other, tmp_path)
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, 1)
    assert done.served == [(6, 6)]
    assert OWN_LOADER not in done.log(1)
    assert sorted(folder.name for folder in (other.run.path / "modules").iterdir()) == ["01", "logs"]
    assert other.run.phase("finetune").result["steps"] == 6
    assert done.leaves_no_shared_memory()


def test_co_training_resumes_modules_at_different_steps(plain: Any, other: Any, tmp_path: Path) -> None:
    ahead = Command(*other.command("incubate", 1), before=partial(hold_step, 31))
    assert ahead.until(lambda: any(row["step"] >= 30 for row in other.log("incubate", 1)))
    ahead.send(signal.SIGTERM)
    assert ahead.wait() == 75

    first = CoTrained(other, tmp_path, before=shell_with_held_steps)
    first.until_step(10, 0)
    os.killpg(first.command.pid, signal.SIGINT)
    assert first.command.wait() == 75
    assert "--co-train" in first.command.out.splitlines()[-1]
    assert other.log("incubate", 1)[-1]["step"] - other.log("incubate", 0)[-1]["step"] > 4

    second = CoTrained(other, tmp_path)
    second.until_step(other.log("incubate", 0)[-1]["step"] + 5, 0)
    pids = [second.server_pid, *map(second.pid, MODULES)]
    second.command.kill()

    last = CoTrained(other, tmp_path)
    assert last.command.wait() == 0, last.command.out + last.command.err
    # no orphan; a zombie has ended, and pid 1 may take a moment to reap it
    assert [process_start_time(pid) for pid in pids] == [None] * 3
    assert same_weights(plain, other, *MODULES)
    assert OWN_LOADER not in last.log(0) + last.log(1)
    made, sent = map(sum, zip(*last.served, strict=True))
    assert made < sent
    assert last.leaves_no_shared_memory()


def test_co_training_killed_server_modules_continue_with_their_own_loader(
    plain: Any, other: Any, tmp_path: Path
) -> None:
    left = CoTrained(other, tmp_path)
    left.until_step(10, *MODULES)
    os.kill(left.server_pid, signal.SIGKILL)
    assert left.command.wait() == 0, left.command.out + left.command.err
    assert same_weights(plain, other, *MODULES)
    assert all(left.log(module).count(OWN_LOADER) == 1 for module in MODULES)
    assert left.command.out.count("shared loader: ended by signal 9") == 1
    assert left.leaves_no_shared_memory()


def test_co_training_killed_module_stops_no_other(plain: Any, other: Any, tmp_path: Path) -> None:
    left = CoTrained(other, tmp_path)
    left.until_step(10, *MODULES)
    os.kill(left.pid(0), signal.SIGKILL)
    assert left.command.wait() == 3
    assert same_weights(plain, other, 1)
    assert OWN_LOADER not in left.log(1)
    assert left.served[0][0] == STEPS
    assert left.command.out.count("failed") == 1


def test_co_training_damaged_shard_ends_every_module_with_one_line(
    harness: Harnesses, digits: Path, tmp_path: Path, bigincubate: Callable[..., Any]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    other = harness(f"data.path={data}", "train.max_steps=6")
    other.train("pretrain")
    (shard,) = data.glob("train/**/*.mds")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    failed = CoTrained(other, tmp_path)
    assert failed.command.wait() == 3
    for module in MODULES:
        assert failed.log(module).startswith(f"bigincubate: {shard} is damaged: SHA-256 ")
        assert failed.log(module).count("\n") == 1
        assert f"module {module}: failed (exit 3): bigincubate: {shard} is damaged" in failed.command.out
    assert failed.served == [(0, 0)]


def test_co_training_server_that_cannot_start_modules_use_their_own_loader(
    plain: Any, other: Any, tmp_path: Path
) -> None:
    (other.run.path / "modules").mkdir()
    (other.run.path / "modules" / "logs").write_text("in the way")
    done = CoTrained(other, tmp_path)
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    assert f"shared loader: could not be started ({other.run.path}/modules/logs: File exists)" in done.command.out
    assert OWN_LOADER not in done.log(0) + done.log(1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--jobs", 1], "--co-train trains 2 modules in parallel; use --jobs 2, or omit --co-train"),
        (["--jobs", 2, "--baseline"], "--co-train trains 2 modules and the baseline in parallel; use --jobs 3,"),
        (["--method", "expand"], '--co-train: plan.incubate = "none", so no modules share a loader; omit --co-train'),
        (["--set", "data.decentralized=true"], "--co-train: with data.decentralized, each module has its own data"),
    ],
)
def test_co_training_impossible_options_are_refused(fast: Path, tmp_path: Path, words: list[object], line: str) -> None:
    refused = run("run", fast, "--run-dir", tmp_path / "run", "--co-train", *words)
    assert refused.wait() == 2
    assert refused.err.startswith(f"bigincubate: {line}")
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_server_started_by_hand_is_refused(fast: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigincubate.experimental.shared_loader", str(fast)]
    command += ["--run-dir", str(tmp_path / "run"), "--clients", "1"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("bigincubate: BIGINCUBATE_SHARED_LOADER is not set: ")
    assert refused.stderr.count("\n") == 1
