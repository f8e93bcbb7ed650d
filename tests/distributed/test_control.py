"""How often the ranks agree on whether to stop."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from launching import launch, words

from bigincubate.distributed.process_group import DistributedContext
from bigincubate.training.control import MAX_STEPS, ControlPoll

Harnesses = Callable[..., Any]
STEPS = 400


def on_two_ranks(folder: Path, function: Callable[[], Any]) -> list[Any]:
    """Run a function on two forked ranks with gloo, and return its value on each."""
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        (folder / f"{number}.json").write_text(json.dumps(function()))

    ranks = [fork.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


def agreements(env: DistributedContext, seconds: float, stop_at: int) -> dict[str, Any]:
    """Poll once per step; rank 1 sets a flag from the step ``stop_at`` on.

    Returns:
        The number of collective operations, and the step in which the flag was seen.
    """
    now, counts, reduce = [0.0], [0], dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        counts[0] += 1
        return reduce(*arguments, **options)

    poll = ControlPoll(env, clock=lambda: now[0])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_reduce", counted)
        for step in range(STEPS):
            flag = env.rank == 1 and step >= stop_at
            if poll.any_rank(step, False, flag) == (False, True):
                return {"counts": counts[0], "stopped": step}
            now[0] += seconds * (1 if env.rank == 0 else 3)  # only the time of rank 0 matters
    return {"counts": counts[0], "stopped": None}


@pytest.mark.parametrize(("seconds", "interval"), [(0.001, MAX_STEPS), (0.125, 8), (2.0, 1)])
def test_ranks_agree_about_once_a_second_and_at_least_every_fifty_steps(
    seconds: float, interval: int, tmp_path: Path
) -> None:
    def rank() -> list[dict[str, Any]]:
        env = DistributedContext.detect()
        return [agreements(env, seconds, stop_at) for stop_at in (0, 201, STEPS)]

    first, second = on_two_ranks(tmp_path, rank)
    assert first == second
    assert first[0] == {"counts": 1, "stopped": 0}
    assert first[1]["stopped"] is not None
    assert 201 <= first[1]["stopped"] < 201 + interval
    assert first[2]["stopped"] is None
    assert STEPS / interval <= first[2]["counts"] <= STEPS / interval + 2


def test_a_single_process_needs_no_agreement() -> None:
    poll = ControlPoll(DistributedContext())
    assert [poll.any_rank(step, step == 3) for step in range(5)] == [(False,), (False,), (False,), (True,), (False,)]


def test_ranks_agree_in_the_next_step_after_a_restart(tmp_path: Path) -> None:
    def rank() -> list[Any]:
        poll = ControlPoll(DistributedContext.detect(), clock=lambda: 0.0)
        for step in range(60):
            poll.any_rank(step, False)
        found = [poll.next_step, poll.any_rank(60, True)[0]]
        poll.restart()
        return [*found, poll.any_rank(61, True)[0], poll.next_step]

    assert on_two_ranks(tmp_path, rank) == [[101, False, True, 62]] * 2


# ------------------------------------------------------------------------------------------------ real phases

EXPECTED = [0, 1, 11, 21]  # the first interval is one step
DISK_FULL = {"spoiled_rank": 1, "disk_full": True}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # steps between checkpoints, and the fault
    "finished": (1000, {}),
    "stopped": (1000, {"spoiled_rank": 1, "signal_at": 13}),
    "stopped after the last agreement": (1000, {"spoiled_rank": 1, "signal_at": 23}),
    "disk full": (12, DISK_FULL),
    "disk full after the last agreement": (23, DISK_FULL),
    "disk full at the last step": (1000, DISK_FULL),
    "lost": (1000, {"spoiled_rank": 0, "take_over_at": 13}),
    "lost after the last agreement": (1000, {"spoiled_rank": 0, "take_over_at": 23}),
}


class Phases:
    """Phases of 28 steps on two ranks, which agree every ten steps."""

    def __init__(self, harness: Harnesses, folder: Path) -> None:
        self.runs: dict[str, Any] = {}
        jobs: dict[str, dict[str, Any]] = {}
        for name, (every, spoiled) in CASES.items():
            sets = ["train.max_steps=28", f"checkpoint.every_steps={every}", "sharding.strategy=fsdp2"]
            self.runs[name] = harness(*sets)
            jobs[name] = {**words(self.runs[name], "pretrain"), "agreements": True, **spoiled}
        self.outcomes = dict(zip(jobs, launch(folder, list(jobs.values())), strict=True))

    def both(self, name: str, key: str) -> Any:
        """The value of ``key`` that both ranks reported, which must be the same."""
        first, second = (outcome[key] for outcome in self.outcomes[name])
        assert first == second
        return first

    def saved(self, name: str) -> list[str]:
        folder = self.runs[name].run.phase("pretrain").checkpoints
        return sorted(marker.parent.name for marker in folder.glob("*/COMMITTED"))

    def finished(self, name: str) -> bool:
        return self.runs[name].run.phase("pretrain").result is not None


@pytest.fixture(scope="module")
def phases(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Phases:
    return Phases(harness, tmp_path_factory.mktemp("phases"))


def test_ranks_of_a_phase_agree_every_few_steps(phases: Phases) -> None:
    assert phases.both("finished", "code") == 0
    assert phases.both("finished", "agreements") == EXPECTED


def test_both_ranks_stop_at_the_next_agreement(phases: Phases) -> None:
    assert phases.both("stopped", "code") == 75
    assert phases.saved("stopped") == ["step-00000021"]


def test_phase_that_ends_before_the_next_agreement_is_finished(phases: Phases) -> None:
    assert phases.both("stopped after the last agreement", "code") == 0
    assert phases.finished("stopped after the last agreement")


@pytest.mark.parametrize(
    ("name", "step"),
    [("disk full", 12), ("disk full after the last agreement", 23), ("disk full at the last step", 28)],
)
def test_failed_checkpoint_ends_both_ranks(phases: Phases, name: str, step: int) -> None:
    """They end at the next agreement or save, or at the end of the phase."""
    assert phases.both(name, "code") == 3
    assert f"checkpoint of step {step} not written" in phases.both(name, "err")
    assert phases.saved(name) == []
    assert not phases.finished(name)


@pytest.mark.parametrize("name", ["lost", "lost after the last agreement"])
def test_lost_lease_ends_both_ranks(phases: Phases, name: str) -> None:
    assert phases.both(name, "code") == 7
    assert phases.saved(name) == []
    assert not phases.finished(name)
