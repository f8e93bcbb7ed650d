"""A rank that is stopped with SIGSTOP: how long until the others name it and leave, with the patience of a real run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from forked import Command, fork_ranks
from test_ranks import children
from test_watchdog import LONG, as_under_srun
from trial_log import Trial, TrialLog

Harnesses = Callable[..., Any]


@pytest.mark.faults
@pytest.mark.scenario("stopped-rank")
def test_stopped_rank_is_found_and_named(trial_log: TrialLog, harness: Harnesses) -> None:
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            (of_a_launcher, of_srun)[trial.number % 2](trial, harness(*LONG))
    trial_log.check()


def of_a_launcher(trial: Trial, long: Any) -> None:
    words = ["run", long.run.recipe_file, "--run-dir", long.run.path, "--jobs", 1, "--nproc", 2]
    launcher = Command(*words, before=fork_ranks)
    steps = trial.random.randrange(1, 30)
    assert launcher.until(lambda: len(long.log("pretrain")) >= steps), launcher.out
    main = long.run.phase("pretrain").read_attempts()[0]["pid"]
    ranks = {0: main, 1: next(pid for pid in children(launcher.pid) if pid != main)}
    stopped = trial.random.choice((0, 1))
    began = time.monotonic()
    os.kill(ranks[stopped], signal.SIGSTOP)
    assert launcher.wait(120) == 3, launcher.out
    seconds = time.monotonic() - began
    trial.note(seconds=round(seconds, 1))
    assert f"rank {stopped} (process {ranks[stopped]} on" in launcher.out
    assert not children(launcher.pid)
    assert seconds <= 30


def of_srun(trial: Trial, long: Any) -> None:
    """Rank 0 hosts the store; nobody kills the one that is stopped."""
    ranks = as_under_srun(long)
    stopped = trial.random.choice((0, 1))
    steps = trial.random.randrange(1, 30)
    try:
        assert ranks[0].until(lambda: len(long.log("pretrain")) >= steps), ranks[0].err
        began = time.monotonic()
        ranks[stopped].send(signal.SIGSTOP)
        other = ranks[1 - stopped]
        assert other.wait(120) == 3, other.err
        seconds = time.monotonic() - began
        trial.note(seconds=round(seconds, 1))
        assert f"rank {stopped} (process {ranks[stopped].pid} on" in other.err
        assert seconds <= 30
    finally:
        ranks[stopped].kill()
