"""A slow rank of a real run: it is named in the log, in the metrics and by ``status``, until it is fast again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Command, fork_ranks
from test_ranks import wait_for

from bigincubate.errors import Exit
from bigincubate.report.console_tables import status_table
from bigincubate.report.status import read_plan, run_status

Harnesses = Callable[..., Any]
LONG = ["train.max_steps=100000", "train.batch_size=24", "log.every_steps=5", "schedule.name=constant"]
FLAG = "SLOW_RANK_1"  # environment variable with a file; rank 1 is slow while the file exists


def is_slow() -> bool:
    return os.environ["RANK"] == "1" and Path(os.environ[FLAG]).exists()


def compare_often() -> None:
    """Ranks are compared several times per second."""
    fork_ranks()
    from bigincubate.distributed import stragglers, watchdog

    watchdog.POLL_SECONDS, watchdog.MAX_UNCHANGED_POLLS = 0.1, 600
    stragglers.INTERVAL = 0.1


def slow_loader() -> None:
    """Rank 1 gets each batch late while the file exists."""
    compare_often()
    from bigincubate.data.streams import TrainStream

    batches = TrainStream.batches

    def slow(self: TrainStream, step: int) -> Iterator[Any]:
        for batch in batches(self, step):
            if is_slow():
                time.sleep(0.1)
            yield batch

    TrainStream.batches = slow  # type: ignore[method-assign,assignment]


def slow_forward() -> None:
    """Rank 1 needs longer for each forward pass while the file exists."""
    compare_often()
    from bigincubate.tasks.image_classification.task import ImageClassification

    loss = ImageClassification.loss

    def slow(self: ImageClassification, *arguments: Any) -> Any:
        if is_slow():
            time.sleep(0.1)
        return loss(self, *arguments)

    ImageClassification.loss = slow  # type: ignore[assignment,method-assign]


def events(run: Any) -> list[list[int]]:
    """The ranks that were named in each event."""
    rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    return [[each["rank"] for each in row["stragglers"]] for row in rows if row["event"] == "stragglers"]


@pytest.mark.parametrize("slow", [slow_loader, slow_forward])
def test_slow_rank_is_named_until_it_is_fast_again(
    slow: Callable[[], None], harness: Harnesses, tmp_path: Path
) -> None:
    one = harness(*LONG)
    run, folder, flag = one.run, one.run.phase("pretrain"), tmp_path / "slow"
    flag.touch()
    words = ["run", run.recipe_file, "--run-dir", run.path, "--jobs", 1, "--nproc", 3]
    launcher = Command(*words, before=slow, env={FLAG: str(flag)})
    try:
        assert launcher.until(lambda: folder.stragglers), launcher.out
        (found,) = folder.stragglers
        assert (found["rank"], found["host"]) == (1, folder.read_attempts()[0]["host"])
        assert found["seconds"] >= 0.1
        assert (found["waited"] >= 0.1) == (slow is slow_loader)
        (row, *_) = run_status(run)
        assert row["stragglers"] == [found]
        cells = [*status_table("run", [row], read_plan(run)).columns[-1].cells]
        assert str(cells[0]).startswith(f"rank 1 ({found['host']}) is slow: {found['ratio']:.1f} times the median")

        flag.unlink()
        wait_for(lambda: folder.stragglers == [])
    finally:
        launcher.send(signal.SIGTERM)
        assert launcher.wait() == Exit.PREEMPTED, launcher.out
    assert events(run) == [[1], []]
    assert max(row.get("perf/slowest_rank_ratio", 0) for row in one.log("pretrain")) > 1.5
    assert "work/slowest rank ratio" in one.events("pretrain").Tags()["scalars"]
    log = "".join(file.read_text() for file in sorted((folder.path / "logs").iterdir()))
    assert log.count("rank 1 (") == 1
    assert "takes" in log
    assert log.count("the ranks are equally fast again") == 1
