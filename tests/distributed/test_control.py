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

from bigincubate.distributed.process_group import DistributedContext
from bigincubate.training.control import MAX_STEPS, ControlPoll

STEPS = 400


def on_two_ranks(folder: Path, function: Callable[[], Any]) -> list[Any]:
    """Run a function on two gloo ranks, which are forked, and return what it returns on each."""
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
    """Poll once per step; rank 1 sets a flag. Returns the number of collective operations, and where it was seen."""
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
def test_ranks_agree_once_a_second_or_every_fifty_steps(seconds: float, interval: int, tmp_path: Path) -> None:
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


def test_rollback_to_an_earlier_step_is_an_agreement(tmp_path: Path) -> None:
    def rank() -> list[int]:
        env = DistributedContext.detect()
        poll = ControlPoll(env, clock=lambda: 0.0)
        for step in range(60):
            poll.any_rank(step, False)
        before = poll.next_step
        return [before, poll.any_rank(20, True) == (True,), poll.next_step]

    assert on_two_ranks(tmp_path, rank) == [[101, True, 21], [101, True, 21]]
