"""One owner for a phase: the second is refused and told who, the dead are replaced at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, hold_step, run
from parts import MANIFEST

from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import LockedError, SystemResourceError
from bigincubate.launchers.slurm import job_queue
from bigincubate.launchers.slurm.job_queue import SlurmQueue
from bigincubate.storage import lease as lease_module
from bigincubate.storage.artifacts import load_artifact, save_artifact
from bigincubate.storage.checkpoint_manager import CheckpointManager
from bigincubate.storage.checkpoint_verification import verify_checkpoint
from bigincubate.storage.lease import acquire_lease, process_start_time

HERE = socket.gethostname()


def owner(folder: Path, number: int = 1, **fields: Any) -> Path:
    """Create a lease of another process on ``folder``."""
    file = folder / "owners" / f"{number}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**lease_module.describe_process(1), **fields}))
    return file


def owner_of(folder: Path) -> tuple[int, dict[str, Any]]:
    """The lease that counts."""
    file = max((folder / "owners").glob("[0-9]*.json"), key=lambda file: int(file.stem))
    return int(file.stem), json.loads(file.read_text() or "{}")


def test_owner_is_named_while_it_lives(tmp_path: Path) -> None:
    with acquire_lease(tmp_path / "phase", DistributedContext()) as lease:
        number, mine = owner_of(tmp_path / "phase")
        assert (number, mine["host"], mine["pid"]) == (lease.generation, HERE, os.getpid()) == (1, HERE, os.getpid())
        with (
            pytest.raises(LockedError, match=f"belongs to process {os.getpid()} on {HERE}"),
            acquire_lease(tmp_path / "phase", DistributedContext()),
        ):
            pass
        assert owner_of(tmp_path / "phase") == (number, mine)  # the refused one took nothing away
    assert owner_of(tmp_path / "phase") == (1, {})
    assert LockedError.code == 7


def test_lease_is_released_after_an_error_and_its_number_not_reused(tmp_path: Path) -> None:
    with pytest.raises(KeyError), acquire_lease(tmp_path, DistributedContext()):
        raise KeyError
    with acquire_lease(tmp_path, DistributedContext()) as lease:
        assert lease.generation == 2


def test_live_local_process_keeps_its_lease_however_long_silent(tmp_path: Path) -> None:
    os.utime(owner(tmp_path, job="41_2"), (0, 0))
    with (
        pytest.raises(LockedError, match=rf"process 1 on {HERE}, job 41_2"),
        acquire_lease(tmp_path, DistributedContext()),
    ):
        pass


def test_dead_local_process_is_replaced_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner(tmp_path, pid=gone.pid, started="1")
    with acquire_lease(tmp_path, DistributedContext()):
        assert owner_of(tmp_path)[1]["pid"] == os.getpid()


def test_pid_that_was_given_to_another_process_is_not_the_owner(tmp_path: Path) -> None:
    owner(tmp_path, started="7")  # process 1 lives, but this is not when it started
    with acquire_lease(tmp_path, DistributedContext()):
        pass


def test_zombie_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    started = process_start_time(child.pid)
    assert started is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and stays a zombie
    owner(tmp_path, pid=child.pid, started=started)
    with acquire_lease(tmp_path, DistributedContext()):
        pass
    child.wait()


# ------------------------------------------------------------------------------------------------ other hosts

ELSEWHERE: dict[str, Any] = {"host": "elsewhere", "pid": 5, "started": "3"}


@contextmanager
def beating(file: Path) -> Iterator[None]:
    """Its owner lives, somewhere."""
    over = threading.Event()

    def touch_until_over() -> None:
        while not over.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=touch_until_over)
    thread.start()
    yield
    over.set()
    thread.join()


def silent(file: Path, seconds: float) -> Path:
    past = time.time() - seconds
    os.utime(file, (past, past))
    return file


@pytest.mark.parametrize("fields", [{"host": "elsewhere"}, {"space": "a container"}, {"started": None}])
def test_live_owner_known_by_heartbeat_only_keeps_its_lease(fields: Any, tmp_path: Path) -> None:
    """On another host, in another pid namespace of this one, or where processes cannot be told apart."""
    with (
        beating(owner(tmp_path, **{**ELSEWHERE, "host": HERE, **fields})),
        pytest.raises(LockedError, match=f"process 5 on {fields.get('host', HERE)};"),
        acquire_lease(tmp_path, DistributedContext()),
    ):
        pass


def test_silent_owner_is_replaced_when_its_lease_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(owner(tmp_path, **ELSEWHERE), lease_module.LEASE_SECONDS + 1)
    with acquire_lease(tmp_path, DistributedContext()) as lease:
        assert lease.generation == 2
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.0)
    file = owner(tmp_path, 3, **ELSEWHERE)
    with acquire_lease(tmp_path, DistributedContext()) as lease:
        assert time.time() - file.stat().st_mtime > 1.0
        assert lease.generation == 4
    assert lease_module.HEARTBEAT_SECONDS * 2 <= 10  # a live one is heard within ten seconds


def test_lease_uses_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e12)
    with (
        beating(owner(tmp_path, **ELSEWHERE)),
        pytest.raises(LockedError),
        acquire_lease(tmp_path, DistributedContext()),
    ):
        pass


def test_live_owner_renews_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    with acquire_lease(tmp_path, DistributedContext()):
        file = tmp_path / "owners" / "1.json"
        os.utime(file, (0, 0))
        for _ in range(3000):
            if file.stat().st_mtime:
                break
            time.sleep(0.01)
        assert time.time() - file.stat().st_mtime < lease_module.LEASE_SECONDS
    assert lease_module.LEASE_SECONDS > 3 * 5.0  # a beat or two may be lost


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_damaged_lease_has_no_owner(text: str, tmp_path: Path) -> None:
    owner(tmp_path).write_text(text)
    with acquire_lease(tmp_path, DistributedContext()):
        pass


def test_lease_requested_by_many_at_once_goes_to_one(tmp_path: Path) -> None:
    """Each is as of another host: nothing but the lease keeps them apart."""
    owner(tmp_path, pid=2**22 + 1, started="1")
    start = threading.Barrier(8)

    def acquire(_: int) -> Any:
        start.wait()
        try:
            return lease_module._acquire_alone(tmp_path)
        except LockedError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(acquire, range(8)))
    leases = [outcome for outcome in outcomes if isinstance(outcome, lease_module.Lease)]
    assert [lease.generation for lease in leases] == [2]
    assert sum("belongs to process" in str(outcome) for outcome in outcomes) == 7


# ------------------------------------------------------------------------------------------------ Slurm


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """``job(SLURM_JOB_ID="7", answer="RUNNING")``: this process is of that job, and the queue says that of any."""

    def become(answer: str | None = None, error: str = "", **env: str) -> None:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name, value in {"SLURM_CLUSTER_NAME": "here", **env}.items():
            monkeypatch.setenv(name, value)
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        if answer is not None:
            script = (
                f"#!/bin/sh\necho $@ >>{tools}/asked\necho '{error}' >&2\necho '{answer}'\nexit {int(bool(error))}\n"
            )
            (tools / "squeue").write_text(script)
            (tools / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:/bin" if answer is not None else str(tools))

    return become


def test_requeued_job_takes_over_from_its_previous_attempt_at_once(job: Callable[..., None], tmp_path: Path) -> None:
    job(SLURM_JOB_ID="41", SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="2", SLURM_RESTART_COUNT="1")
    previous = {**ELSEWHERE, "cluster": "here", "job": "41_2", "restarts": 0}
    for number, place in ((1, {}), (3, {"host": HERE, "pid": 1, "started": process_start_time(1)})):
        with (
            beating(owner(tmp_path, number, **{**previous, **place})),
            acquire_lease(tmp_path, DistributedContext(), SlurmQueue()) as lease,
        ):
            mine = owner_of(tmp_path)[1]
            assert (mine["job"], mine["restarts"]) == ("41_2", 1)
            assert lease.generation == number + 1
    # another task, another cluster, a later restart: not a previous attempt of this job
    for number, other in ((5, {"job": "41_3"}), (6, {"cluster": "there"}), (7, {"restarts": 1}), (8, {"restarts": 2})):
        with (
            beating(owner(tmp_path, number, **{**previous, **other})),
            pytest.raises(LockedError, match=rf"on elsewhere, job {other.get('job', '41_2')};"),
            acquire_lease(tmp_path, DistributedContext(), SlurmQueue()),
        ):
            pass


@pytest.mark.parametrize(
    ("answer", "error", "ended"),
    [
        ("NODE_FAIL", "", True),
        ("PENDING", "", True),
        ("", "slurm_load_jobs error: Invalid job id specified", True),
        ("RUNNING", "", False),
        ("COMPLETING", "", False),
        ("", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", False),
        (None, "", False),
    ],
)
def test_ended_job_is_replaced_at_once(
    answer: str | None, error: str, ended: bool, job: Callable[..., None], tmp_path: Path
) -> None:
    job(answer, error, SLURM_JOB_ID="50")
    file = owner(tmp_path, **ELSEWHERE, cluster="here", job="41_2")
    if ended:
        with acquire_lease(tmp_path, DistributedContext(), SlurmQueue()) as lease:
            assert lease.generation == 2
        assert (tmp_path / "bin" / "asked").read_text().split()[-2:] == ["--jobs", "41_2"]
        return
    with (
        beating(file),
        pytest.raises(LockedError, match="job 41_2"),
        acquire_lease(tmp_path, DistributedContext(), SlurmQueue()),
    ):
        pass


def test_silent_queue_is_not_waited_for(
    job: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_queue.SQUEUE_TIMEOUT + lease_module.HEARTBEAT_SECONDS <= 10
    monkeypatch.setattr(job_queue, "SQUEUE_TIMEOUT", 0.2)
    job("RUNNING", SLURM_JOB_ID="50")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    with (
        beating(owner(tmp_path, **ELSEWHERE, cluster="here", job="41_2")),
        pytest.raises(LockedError),
        acquire_lease(tmp_path, DistributedContext(), SlurmQueue()),
    ):
        pass


# ------------------------------------------------------------------------------------------------ superseded


def test_superseded_owner_commits_and_prunes_nothing(tmp_path: Path) -> None:
    with acquire_lease(tmp_path, DistributedContext()) as lease:
        checkpoints = CheckpointManager.open(tmp_path / "checkpoints", DistributedContext(), digest="d", lease=lease)
        for step in (1, 2):
            checkpoints.save(step, {"w": torch.ones(2)}, {})
        owner(tmp_path, 2, **ELSEWHERE)
        for step in (2, 3):
            with pytest.raises(LockedError, match=f"{tmp_path} was taken over by process 5 on elsewhere while"):
                checkpoints.save(step, {"w": torch.zeros(2)}, {})
        with pytest.raises(LockedError):
            checkpoints._prune(1)
        with pytest.raises(LockedError):
            CheckpointManager.open(tmp_path / "checkpoints", DistributedContext(), digest="d", lease=lease)
        assert [folder.name for folder in (tmp_path / "checkpoints").iterdir() if not verify_checkpoint(folder)] == [
            folder.name for folder in (tmp_path / "checkpoints").iterdir()
        ]
        assert checkpoints.committed_steps() == [1, 2]
        save_artifact(tmp_path / "artifact", {"w": torch.ones(2)}, MANIFEST)
        with pytest.raises(LockedError):
            save_artifact(tmp_path / "artifact", {"w": torch.zeros(2)}, MANIFEST, lease)
        assert load_artifact(tmp_path / "artifact")[0]["w"].tolist() == [1, 1]
    assert owner_of(tmp_path)[1]["host"] == "elsewhere"  # whose it stays


@pytest.mark.parametrize("moment", ["aside", "final"])
def test_lease_superseded_during_commit_keeps_new_owner_checkpoint(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held between two of its renames, until the new owner has committed the same step."""
    first, new_owner = (CheckpointManager.open(tmp_path, DistributedContext(), digest="d") for _ in range(2))
    rename = Path.rename

    def held(self: Path, target: Path) -> Path:
        if self.is_dir() == (moment == "aside"):
            monkeypatch.setattr(Path, "rename", rename)
            new_owner = CheckpointManager.open(tmp_path, DistributedContext(), digest="d")
            new_owner.save(4, {"w": torch.ones(2)}, {})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", held)
    with pytest.raises(SystemResourceError, match="No such file"):
        first.save(4, {"w": torch.zeros(2)}, {})
    checkpoint = new_owner.load_latest()
    assert checkpoint is not None
    assert checkpoint.tensors["w"].tolist() == [1, 1]
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000004"]


# ------------------------------------------------------------------------------------------------ real processes


def trainers(harness: Callable[..., Any]) -> Any:
    return harness("train.max_steps=100000", "checkpoint.every_steps=4", "log.every_steps=1", "schedule.name=constant")


def test_second_process_on_a_phase_is_refused(harness: Callable[..., Any]) -> None:
    shared = trainers(harness)
    commands = [Command(*shared.command("pretrain"), before=partial(hold_step, 10)) for _ in range(2)]
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
    assert owner_of(folder.path)[1]["pid"] == proceeding.pid
    assert len(folder.read_attempts()) == 1  # the refused one was no attempt
    new_owner = Command(*shared.command("pretrain"))
    assert new_owner.until(lambda: len(folder.read_attempts()) == 2)
    assert owner_of(folder.path)[1]["pid"] == new_owner.pid
    new_owner.kill()


def test_modules_do_not_lock_each_other(harness: Callable[..., Any]) -> None:
    shared = harness()
    shared.train("pretrain")
    commands = [Command(*shared.command("incubate", module)) for module in (0, 1)]
    assert [command.wait() for command in commands] == [0, 0]


def test_lease_is_free_after_a_phase(harness: Callable[..., Any]) -> None:
    shared = harness("train.max_steps=1")
    assert run(*shared.command("pretrain")).wait() == 0
    assert owner_of(shared.run.phase("pretrain").path) == (1, {})


def as_of(host: str, lease: float) -> None:
    """This process runs on another host, and takes others for dead after a shorter time."""
    socket.gethostname = lambda: host
    lease_module.LEASE_SECONDS, lease_module.HEARTBEAT_SECONDS = lease, lease / 4


def hold_step_elsewhere() -> None:
    as_of("elsewhere", 1.0)
    hold_step(9)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_superseded_owner_changes_nothing_after_it_wakes_up(harness: Callable[..., Any]) -> None:
    shared = harness("train.max_steps=60", "checkpoint.every_steps=4", "log.every_steps=1", "schedule.name=constant")
    folder = shared.run.phase("pretrain")
    first = Command(*shared.command("pretrain"), before=hold_step_elsewhere)
    assert first.until((folder.checkpoints / "step-00000008" / "COMMITTED").exists)
    first.send(signal.SIGSTOP)
    try:
        new_owner = Command(*shared.command("pretrain"), before=partial(as_of, HERE, 1.0))
        assert new_owner.wait() == 0, new_owner.err
        before = contents(shared.run.path)
    finally:
        first.send(signal.SIGCONT)
    assert first.wait() == 7
    assert f"{folder.path} was taken over by" in first.err
    assert first.err.count("\n") == 1
    after = contents(shared.run.path)
    assert json.loads(after.pop("meta/attempts/1.json"))["state"] == "failed"  # its own
    before.pop("meta/attempts/1.json")
    for files in (before, after):  # events it had not yet written when it was stopped: files of its own
        for events in ("meta/tb/", "fleet/meta/"):
            del files[events + min(Path(name).name for name in files if name.startswith(events))]
        files.pop("meta/owners/1.json")  # left
    assert after == before
    assert [row["step"] for row in shared.log("pretrain")] == list(range(1, 61))
