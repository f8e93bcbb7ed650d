"""Logging: what a line looks like, and which lines are written."""

from __future__ import annotations

import io
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from bigincubate.distributed.rank_logging import LogLevel, setup_logging
from bigincubate.tasks.image_classification.task import ImageClassification
from bigincubate.training.metrics_writer import describe_step

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank %d %s: %s\n"


def log_everything() -> None:
    """Write a record of each level."""
    logger = logging.getLogger("bigincubate.anything")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "a %s", "text")


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("level", "first"), [("debug", 0), ("info", 1), ("warning", 2), ("error", 3)])
def test_log_level_and_rank_decide_what_is_written(
    level: LogLevel, first: int, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("debug")
    setup_logging(level, rank)  # the later call counts, and no line is written twice
    log_everything()
    names = ["DEBUG", "INFO", "WARNING", "ERROR"][max(first, 2 if rank else 0) :]
    captured = capsys.readouterr()
    for text, shown in ((captured.out, names[:-2]), (captured.err, names[-2:])):
        assert re.fullmatch("".join(LINE % (rank, name, "a text") for name in shown), text)


def test_log_lines_appear_above_live_progress_bars() -> None:
    setup_logging("info")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with Progress(console=console, auto_refresh=False) as progress:
        progress.add_task("pretrain", total=3)
        progress.refresh()
        log_everything()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    for name in ("INFO", "WARNING", "ERROR"):
        assert re.search(rf"\d\d:\d\d rank 0 {name}: a text *\n", shown), shown


VALUES = {
    "train/loss": 2.34567,
    "train/lr": 1e-3,
    "train/grad_norm": 12.3456,
    "train/skipped": 0.0,
    "perf/images_per_sec": 512.04,
    "perf/gflops": 3.0,
    "perf/data_wait": 0.0123,
    "memory/peak_gib": 1.5,
}


def describe(step: int, **changed: Any) -> str:
    planned: Any = SimpleNamespace(
        title="module 1", steps=1000, unit="images", batch_units=256, metrics=ImageClassification.metrics
    )
    return describe_step(planned, step, {**VALUES, **changed})


def test_log_line_of_a_step_has_all_that_is_watched() -> None:
    assert describe(500) == (
        "module 1: step 500 of 1000, loss 2.3457, grad norm 12.3, lr 0.001, 512.0 images/s, data wait 1.2%, "
        "memory 1.50 GiB, ETA 0:04:10"
    )
    assert describe(1000, **{"val/top1": 71.234}).endswith("memory 1.50 GiB, top-1 71.23%, ETA 0:00:00")
    assert "nan" in describe(3, **{"train/loss": float("nan"), "perf/images_per_sec": 0.0})
