"""A rank that is stopped: found and named by the others, and none hangs; one that is merely busy is left alone."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from forked import Command, fork_ranks
from test_ranks import children, wait_for

from bigincubate.distributed import watchdog
from bigincubate.distributed.flight_recorder import DUMP_SECONDS
from bigincubate.storage.lease import process_start_time

Harnesses = Callable[..., Any]
LONG = ["train.max_steps=100000", "log.every_steps=1", "schedule.name=constant"]


def impatient() -> None:
    """What takes 18 seconds takes two; and one step of rank 1 takes longer than that."""
    watchdog.POLL_SECONDS, watchdog.MAX_UNCHANGED_POLLS = 0.1, 20
    from bigincubate.training.trainer import Trainer

    step = Trainer.step

    def busy(self: Trainer, batch: Any) -> Any:
        if self.state.step == 2 and self.env.rank == 1:
            time.sleep(2.5)  # as a kernel would, without the interpreter's lock
        return step(self, batch)

    Trainer.step = busy  # type: ignore[method-assign]


def impatient_launcher() -> None:
    fork_ranks()
    impatient()


def test_stopped_rank_is_named_by_the_other(harness: Harnesses) -> None:
    long = harness(*LONG)
    folder = long.run.phase("pretrain")
    words = ["run", long.run.recipe_file, "--run-dir", long.run.path, "--jobs", 1, "--nproc", 2]
    launcher = Command(*words, before=impatient_launcher)
    assert launcher.until(lambda: len(long.log("pretrain")) > 3), launcher.out

    # suspended with Ctrl-Z, the launcher and its store do not answer: the ranks go on
    launcher.send(signal.SIGSTOP)
    time.sleep(2.5)
    before = len(long.log("pretrain"))
    wait_for(lambda: len(long.log("pretrain")) > before)
    launcher.send(signal.SIGCONT)

    main = folder.read_attempts()[0]["pid"]
    (other,) = [pid for pid in children(launcher.pid) if pid != main]
    os.kill(other, signal.SIGSTOP)
    try:
        assert launcher.wait(60) == 3, launcher.out
    except (AssertionError, TimeoutError):
        for pid in (main, other):
            if process_start_time(pid) is not None:  # no other process would end it
                os.kill(pid, signal.SIGKILL)
        raise
    named = f"rank 1 (process {other} on {socket.gethostname()}) did not respond for 2 s"
    assert f"meta model: failed (exit 3): rank 0: bigincubate: {named}" in launcher.out
    assert [process_start_time(pid) for pid in (main, other)] == [None, None]
    (attempt,) = folder.read_attempts()
    assert (attempt["state"], attempt["pid"]) == ("failed", main)
    assert attempt["error"].startswith(named)
    check_dumps(folder.path / "flight_recorder/1", [0])


def check_dumps(folder: Path, ranks: list[int], *, pending: bool = True) -> None:
    """Exactly these ranks have written dumps, with stacks and, if ``pending``, with an unfinished collective."""
    assert sorted(file.name for file in folder.iterdir()) == [f"gloo_{rank}" for rank in ranks]
    for rank in ranks:
        entries = pickle.loads((folder / f"gloo_{rank}").read_bytes())["entries"]
        assert any(not entry["retired"] for entry in entries) == pending
        names = {frame["name"] for entry in entries for frame in entry.get("frames", [])}
        assert {"loop", "train_phase"} <= names


def as_under_srun(harness: Any, before: Callable[[], None] | None = None) -> list[Command]:
    """Two ranks without a launcher; rank 0 hosts their store."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    where["GLOO_SOCKET_IFNAME"] = "lo"
    return [
        Command(*harness.command("pretrain"), before=before, env={**where, "RANK": str(rank), "LOCAL_RANK": "0"})
        for rank in (0, 1)
    ]


def test_stopped_host_of_the_store_is_named(harness: Harnesses) -> None:
    """As under srun, where rank 0 does."""
    long = harness(*LONG)
    folder = long.run.phase("pretrain")
    ranks = as_under_srun(long, impatient)
    try:
        assert ranks[0].until(lambda: len(long.log("pretrain")) > 3), ranks[0].err
        ranks[0].send(signal.SIGSTOP)
        assert ranks[1].wait(60) == 3, ranks[1].err
        named = f"rank 0 (process {ranks[0].pid} on {socket.gethostname()}) did not respond for 2 s"
        assert f"bigincubate: {named}" in ranks[1].err
        (attempt,) = folder.read_attempts()
        assert (attempt["state"], attempt["pid"]) == ("failed", ranks[0].pid)
        assert attempt["error"].startswith(named)
        check_dumps(folder.path / "flight_recorder/1", [1])
    finally:
        assert ranks[0].kill() == -signal.SIGKILL


def hung_training() -> None:
    """A collective may take three seconds, and the training thread of rank 1 hangs; its watchdog still counts."""
    from bigincubate.distributed import process_group
    from bigincubate.training.trainer import Trainer

    process_group.COLLECTIVE_LIMIT = timedelta(seconds=3)
    step = Trainer.step

    def hung(self: Trainer, batch: Any) -> Any:
        if self.state.step == 2 and self.env.rank == 1:
            wait_for(lambda: "gloo_0" in [file.name for file in self.folder.path.glob("flight_recorder/1/*")])
        return step(self, batch)

    Trainer.step = hung  # type: ignore[method-assign]


def test_rank_whose_collective_times_out_dumps_its_flight_recorder(harness: Harnesses) -> None:
    long = harness(*LONG)
    ranks = as_under_srun(long, hung_training)
    assert [rank.wait(60) for rank in ranks] == [1, 1], [rank.err for rank in ranks]
    (attempt,) = long.run.phase("pretrain").read_attempts()
    assert "Timed out waiting 3000ms" in attempt["error"]
    check_dumps(long.run.phase("pretrain").path / "flight_recorder/1", [0], pending=False)


def test_silent_rank_is_found_within_half_a_minute() -> None:
    polls, leaving = watchdog.MAX_UNCHANGED_POLLS + 1, max(1.5 * watchdog.POLL_SECONDS, DUMP_SECONDS)
    assert (polls + 1) * watchdog.POLL_SECONDS + leaving <= 30
