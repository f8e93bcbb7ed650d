"""`bigincubate run --nproc`: ranks of this machine that start, stop and end together, whatever happens to one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, fork_ranks, without_a_name
from launching import LOUD, PHASES

from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import ConfigError
from bigincubate.launchers import rank_group as ranks
from bigincubate.launchers.rank_group import RankGroup
from bigincubate.storage.checkpoint_tools import convert_checkpoint
from bigincubate.storage.checkpoint_verification import verify_checkpoint
from bigincubate.storage.lease import process_start_time

Harnesses = Callable[..., Any]
STEPS = 300  # of the phase that is interrupted

# ------------------------------------------------------------------------------------------------ any command

AS_TOLD = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
told = sys.argv[1 + rank]
if told == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if told == "counts":
    signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print(*(os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")), flush=True)
if told in ("stubborn", "counts", "waits"):
    time.sleep(60)
if told.startswith("late"):
    time.sleep(0.5)
    told = told.removeprefix("late ")
if int(told) < 0:
    os.kill(os.getpid(), -int(told))
print("line of", rank)
sys.exit(int(told))
"""


def told(folder: Path, *what: object) -> RankGroup:
    logs = [folder / f"{rank}.log" for rank in range(len(what))]
    return RankGroup.start([sys.executable, "-c", AS_TOLD, *map(str, what)], dict(os.environ), logs)


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def end(group: RankGroup) -> int:
    """Its exit code."""
    wait_for(lambda: group.poll() is not None)
    code = group.poll()
    assert code is not None
    for process in group.processes:
        assert process.pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
    return code


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "FOLLOW_SECONDS", 0.3)
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.3)


def test_rank_gets_its_number_and_the_store(tmp_path: Path) -> None:
    group = told(tmp_path, 0, 0, 0)
    assert end(group) == 0
    for rank, log in enumerate(group.logs):
        world, local, address, port = log.read_text().splitlines()[0].split()
        assert (world, local, address, port) == ("3", str(rank), "127.0.0.1", str(group.store.port))


def test_single_rank_needs_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    group = told(tmp_path, 5)
    assert end(group) == 5
    assert group.logs[0].read_text() == "1 0 None None\nline of 0\n"
    assert group.reason == "line of 0"


@pytest.mark.parametrize(
    ("codes", "code", "reason"),
    [
        ((0, 0), 0, None),
        ((75, 75), 75, None),
        (("late 75", 75), 75, None),  # given the time to follow
        ((75, 1), 1, "rank 1: line of 1"),  # not all of them have a checkpoint
        ((2, 2), 2, "line of 0"),  # all say the same: once
        ((1, 3), 3, "rank 1: line of 1"),  # the one that knew why; the other crashed because it was gone
        ((1, -9), -9, "rank 1: ended by signal 9 (Killed)"),
    ],
)
def test_exit_code_is_that_of_the_most_specific_error(
    codes: tuple[Any, ...], code: int, reason: str | None, tmp_path: Path
) -> None:
    group = told(tmp_path, *codes)
    assert end(group) == code
    assert reason in (None, group.reason)


@pytest.mark.parametrize("other", ["waits", "stubborn"])
@pytest.mark.parametrize(("died", "why"), [(-9, "ended by signal 9 (Killed)"), (1, "line of 1")])
def test_other_ranks_end_after_one_died(died: int, why: str, other: str, tmp_path: Path, hurried: None) -> None:
    """Those that do not follow are asked, then killed; what that does to them is not the cause."""
    group = told(tmp_path, other, died, other)
    assert end(group) == died
    assert group.reason == f"rank 1: {why}"
    assert group.log == group.logs[1]


def test_exit_code_is_the_first_of_equally_specific_ones(tmp_path: Path) -> None:
    group = told(tmp_path, "late 2", 2)
    assert end(group) == 2
    assert group.log == group.logs[0]


def test_stop_signal_reaches_each_rank_once(tmp_path: Path) -> None:
    group = told(tmp_path, "counts", "counts")
    wait_for(lambda: all(log.read_text() for log in group.logs))
    for _ in range(2):
        group.stop()
        wait_for(lambda: all("asked" in log.read_text() for log in group.logs))
    time.sleep(0.3)  # in which nothing must come
    for process in group.processes:
        process.send_signal(signal.SIGKILL)
    end(group)
    assert [log.read_text().count("asked") for log in group.logs] == [1, 1]


def test_ranks_stopped_before_they_began_are_no_failure(tmp_path: Path) -> None:
    group = told(tmp_path, "waits", "waits")
    group.stop()
    assert end(group) == -signal.SIGTERM


def test_rank_that_cannot_start_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "1.log").mkdir()
    with pytest.raises(IsADirectoryError):
        told(tmp_path, "waits", "waits")
    assert not [pid for pid in children(os.getpid()) if AS_TOLD.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_more_ranks_than_gpus_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 4), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="4 ranks on this machine, but only 2 visible GPUs") as caught:
        DistributedContext.detect()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ real phases


def children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def nameless() -> None:
    """Forked ranks, on a machine whose own name does not resolve, where that can be had."""
    fork_ranks()
    try:
        without_a_name()
    except OSError as error:
        print(f"no machine without a name: {error}", file=sys.stderr, flush=True)
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        print(f"{socket.gethostname()} does not resolve", file=sys.stderr, flush=True)


class Together:
    """A run of two ranks under FSDP2: stopped, its checkpoint rewritten, one rank killed, finished."""

    def __init__(self, harness: Harnesses, folder: Path) -> None:
        # ranks may agree on a stop only 50 steps later: each attempt must still be training then
        sets = [*LOUD, f"pretrain.train.max_steps={STEPS}"]
        self.single = harness(*sets)
        for phase, module in PHASES:
            self.single.train(phase, module)
        self.double = harness(*sets, "sharding.strategy=fsdp2", "train.micro_batch=8")
        self.phase = self.double.run.phase("pretrain")

        self.stopped = self.launched()
        self.wait_for_steps(self.stopped, 6)
        self.stopped.send(signal.SIGTERM)
        self.stopped_code = self.stopped.wait()
        self.first_attempt = self.phase.read_attempts()
        self.logs = {log.name: log.read_text() for log in sorted((self.phase.path / "logs").iterdir())}

        original = sorted(self.phase.checkpoints.glob("step-*"))[-1]
        self.original = shutil.copytree(original, folder / "original")
        shutil.rmtree(original)
        convert_checkpoint(self.original, original)
        self.alone = self.double.copy(folder / "alone")

        self.killed = self.launched()
        self.wait_for_steps(self.killed, 12)
        self.ranks = self.pids(self.killed)
        os.kill(self.ranks[1], signal.SIGKILL)
        self.killed_code = self.killed.wait()
        self.second_attempt = self.phase.read_attempts()[-1]

        self.orphaned = self.launched()
        self.wait_for_steps(self.orphaned, 6)
        orphans = self.pids(self.orphaned)
        self.orphaned.kill()
        wait_for(lambda: not any(process_start_time(pid) for pid in orphans))
        self.third_attempt = self.phase.read_attempts()[-1]

        self.last = self.launched()
        self.last_code = self.last.wait(300)

    def launched(self) -> Command:
        run = self.double.run
        return Command("run", run.recipe_file, "--run-dir", run.path, "--jobs", 2, "--nproc", 2, before=nameless)

    def wait_for_steps(self, command: Command, count: int) -> None:
        """Wait until an attempt has logged ``count`` steps after the checkpoint that it resumed from."""
        saved = [int(folder.name.removeprefix("step-")) for folder in self.phase.checkpoints.glob("step-*")]
        step = max(saved, default=0) + count
        reached = command.until(lambda: any(row["step"] >= step for row in self.double.log("pretrain")))
        assert reached, command.out + command.err

    def pids(self, launcher: Command) -> list[int]:
        """Of what trains, by rank."""
        logs = [(self.phase.path / "logs" / name).resolve() for name in ("train.log", "train.1.log")]
        writers = {Path(f"/proc/{pid}/fd/1").resolve(): pid for pid in children(launcher.pid)}
        return [writers[log] for log in logs]


@pytest.fixture(scope="module")
def together(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(harness, tmp_path_factory.mktemp("together"))


def test_stop_writes_one_checkpoint_and_exits_75(together: Together) -> None:
    assert together.stopped_code == 75, together.stopped.err
    assert together.stopped.out.count("stopping:") == 1
    assert "failed" not in together.stopped.out
    assert [attempt["state"] for attempt in together.first_attempt] == ["preempted"]
    assert sorted(together.logs) == ["train.1.log", "train.log"]
    assert all(log.count("with a checkpoint") == 1 for log in together.logs.values())
    assert json.loads((together.original / "manifest.json").read_text())["world"] == 2
    assert verify_checkpoint(together.original) is None


def test_killed_rank_is_named_and_ends_the_other(together: Together) -> None:
    assert together.killed_code == 3
    assert len(together.ranks) == 2
    assert "meta model: failed (exit -9): rank 1: ended by signal 9 (Killed)\n" in together.killed.out
    assert together.killed.out.count("failed") == 1
    assert "module 0" not in together.killed.out
    for pid in together.ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert together.second_attempt["state"] == "failed"  # of the one that stayed


def test_ranks_of_a_killed_launcher_save_and_exit(together: Together) -> None:
    assert together.third_attempt["state"] == "preempted"
    assert together.third_attempt["attempt"] == 3


def test_repeated_command_ends_with_the_losses_of_one_process(together: Together) -> None:
    assert together.last_code == 0, together.last.out
    for phase, module in PHASES:
        expected, found = together.single.log(phase, module), together.double.log(phase, module)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in expected], rel=1e-5)
        assert found != expected  # it is not the same run
        weights = together.double.weights(phase, module)
        for name, tensor in together.single.weights(phase, module).items():
            torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3)
    assert (together.double.run.path / "export" / "model.safetensors").exists()


def test_output_is_printed_once(together: Together) -> None:
    lines = together.last.out.splitlines()
    for title in ("meta model", "module 0", "module 1", "fine-tuning"):
        assert lines.count(f"{title}: started") == 1
        assert sum(line.startswith(f"{title}: done, top-1 ") for line in lines) == 1
    steps = [line for line in lines if ": step " in line]
    assert steps
    assert len(steps) == len(set(steps))


def test_host_name_need_not_resolve(together: Together) -> None:
    if "does not resolve" not in together.last.err:
        refused = together.last.err.strip()
        pytest.skip(f"unshare is not permitted here: {refused}" if refused else "here every name resolves")
    assert together.last_code == 0


def test_indivisible_batch_is_reported_once(harness: Harnesses) -> None:
    odd = harness()
    command = Command("run", odd.run.recipe_file, "--run-dir", odd.run.path, "--nproc", 3, before=nameless)
    assert command.wait() == 2
    assert command.out.count("3 ranks; use a multiple of 3") == 1
    assert f"log: {odd.run.phase('pretrain').path / 'logs' / 'train.log'}\n" in command.out


def test_one_process_resumes_from_the_converted_checkpoint_of_two(together: Together) -> None:
    together.alone.train("pretrain")
    expected, found = together.single.log("pretrain"), together.alone.log("pretrain")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in expected], rel=1e-5)
