"""Measure the time of a rank's own work in each step, and report ranks that are slower than the others."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from ..distributed.stragglers import Straggler, StragglerWatch, Work
from ..planning.context import PhaseContext
from ..storage.lease import Lease

logger = logging.getLogger(__name__)


class StepTimer:
    """Measures the times that :mod:`bigincubate.distributed.stragglers` compares.

    Args:
        context: The phase.
        watch: Exchanges the times of the ranks; None to measure nothing, as with a single rank.
    """

    def __init__(self, context: PhaseContext, watch: StragglerWatch | None) -> None:
        self.context, self.watch, self.device = context, watch, context.env.device
        self.steps, self.waited, self.computed = 0, 0.0, 0.0
        self.events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.reported: tuple[Straggler, ...] = ()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measure a forward pass. The host does not wait for the device."""
        if self.watch is None:
            yield
        elif self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self.computed += time.perf_counter() - started

    def end_step(self, waited: float) -> None:
        """Publish the times of a step, which waited ``waited`` seconds for its data."""
        if self.watch is None:
            return
        while self.events and self.events[0][1].query():  # the device may be some steps behind
            start, end = self.events.popleft()
            self.computed += start.elapsed_time(end) / 1000
        self.steps += 1
        self.waited += waited
        self.watch.work = Work(self.steps, self.waited, self.computed)

    def report(self, lease: Lease) -> dict[str, float]:
        """Return the metric of the slowest rank. Log and store the slow ranks if they have changed.

        Args:
            lease: Lease on the phase's folder. If another process has taken over, nothing is reported.
        """
        if self.watch is None or not self.context.env.is_main or not lease.is_held():
            return {}
        named, ratio = self.watch.detector.named, self.watch.detector.ratio
        if named is not self.reported:
            self.reported = named
            rows = [{**asdict(straggler), "ratio": straggler.ratio} for straggler in named]
            self.context.folder.write_stragglers(rows)
            self.context.run.log_event("stragglers", phase=self.context.row.key, stragglers=rows)
            for straggler in named:
                logger.warning("%s: %s", self.context.row.title, straggler)
            if not named:
                logger.info("%s: the ranks are equally fast again", self.context.row.title)
        return {} if ratio is None else {"perf/slowest_rank_ratio": ratio}
