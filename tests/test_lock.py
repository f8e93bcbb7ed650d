"""One owner for a phase: the second is refused and told who, the dead are replaced at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Command, run

from bigincubate.checkpoint import lock
from bigincubate.checkpoint.lock import owned, start_time
from bigincubate.cluster.env import RunEnv
from bigincubate.errors import LockedError

HERE = socket.gethostname()


def owner(folder: Path, **fields: Any) -> Path:
    """Somebody else's claim on ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "OWNER"
    file.write_text(json.dumps({"host": HERE, "pid": 1, "started": start_time(1), "job": None, **fields}))
    return file


def test_an_owner_is_named_while_it_lives_and_gone_afterwards(tmp_path: Path) -> None:
    with owned(tmp_path / "phase", RunEnv()):
        mine = json.loads((tmp_path / "phase" / "OWNER").read_text())
        assert (mine["host"], mine["pid"]) == (HERE, os.getpid())
        with (
            pytest.raises(LockedError, match=f"belongs to process {os.getpid()} on {HERE}"),
            owned(tmp_path / "phase", RunEnv()),
        ):
            pass
        assert (tmp_path / "phase" / "OWNER").exists()  # the refused one took nothing away
    assert not (tmp_path / "phase" / "OWNER").exists()
    assert LockedError.code == 7


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), owned(tmp_path, RunEnv()):
        raise KeyError
    with owned(tmp_path, RunEnv()):
        pass


def test_a_live_process_here_is_respected_however_long_it_was_silent(tmp_path: Path) -> None:
    os.utime(owner(tmp_path, job="41_2"), (0, 0))
    with pytest.raises(LockedError, match=rf"process 1 on {HERE}, job 41_2"), owned(tmp_path, RunEnv()):
        pass


def test_a_dead_process_here_is_replaced_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner(tmp_path, pid=gone.pid, started="1")
    with owned(tmp_path, RunEnv()):
        assert json.loads((tmp_path / "OWNER").read_text())["pid"] == os.getpid()


def test_a_pid_that_was_given_to_another_process_is_not_the_owner(tmp_path: Path) -> None:
    owner(tmp_path, started="7")  # process 1 lives, but this is not when it started
    with owned(tmp_path, RunEnv()):
        pass


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    started = start_time(child.pid)
    assert started is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and stays a zombie
    owner(tmp_path, pid=child.pid, started=started)
    with owned(tmp_path, RunEnv()):
        pass
    child.wait()


def test_an_owner_on_another_host_has_a_lease(tmp_path: Path) -> None:
    file = owner(tmp_path, host="elsewhere", pid=5, started="3")
    with pytest.raises(LockedError, match="process 5 on elsewhere"), owned(tmp_path, RunEnv()):
        pass
    past = time.time() - lock.LEASE - 1
    os.utime(file, (past, past))
    with owned(tmp_path, RunEnv()):
        pass


def test_a_live_owner_renews_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with owned(tmp_path, RunEnv()):
        file = tmp_path / "OWNER"
        os.utime(file, (0, 0))
        for _ in range(3000):
            if file.stat().st_mtime:
                break
            time.sleep(0.01)
        assert time.time() - file.stat().st_mtime < lock.LEASE
    assert lock.LEASE > 3 * 10.0  # a beat or two may be lost


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_a_damaged_claim_is_nobodys(text: str, tmp_path: Path) -> None:
    (tmp_path / "OWNER").write_text(text)
    with owned(tmp_path, RunEnv()):
        pass


# ------------------------------------------------------------------------------------------------ real processes


def trainers(lab: Callable[..., Any]) -> Any:
    return lab("train.max_steps=100000", "checkpoint.every_steps=4", "log.every_steps=1", "schedule.name=constant")


def test_two_at_once_on_one_phase(lab: Callable[..., Any]) -> None:
    shared = trainers(lab)
    commands = [Command(*shared.command("pretrain")) for _ in range(2)]
    while all(command.running for command in commands):
        time.sleep(0.01)
    refused, proceeding = sorted(commands, key=lambda command: command.running)
    assert refused.wait() == 7
    assert refused.err.startswith("bigincubate: ")
    assert f"belongs to process {proceeding.pid} on {HERE}" in refused.err
    assert refused.err.count("\n") == 1
    assert proceeding.until(lambda: len(shared.log("pretrain")) > 1)

    # kill -9: the next one takes over without waiting, and goes on from the checkpoint
    folder = shared.run.phase("pretrain")
    assert proceeding.until(lambda: list(folder.checkpoints.glob("step-*/COMMITTED")))
    proceeding.kill()
    assert (folder.path / "OWNER").exists()
    assert len(folder.attempts()) == 1  # the refused one was no attempt
    heir = Command(*shared.command("pretrain"))
    assert heir.until(lambda: len(folder.attempts()) == 2)
    assert json.loads((folder.path / "OWNER").read_text())["pid"] == heir.pid
    heir.kill()


def test_modules_do_not_lock_each_other(lab: Callable[..., Any]) -> None:
    shared = lab()
    shared.train("pretrain")
    commands = [Command(*shared.command("incubate", module)) for module in (0, 1)]
    assert [command.wait() for command in commands] == [0, 0]


def test_the_lock_is_free_after_a_phase(lab: Callable[..., Any]) -> None:
    shared = lab("train.max_steps=1")
    assert run(*shared.command("pretrain")).wait() == 0
    assert not (shared.run.phase("pretrain").path / "OWNER").exists()
