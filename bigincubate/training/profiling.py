"""Profile some steps of a phase: a trace of each rank and, on a GPU, a snapshot of its memory."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..compat.torch import record_memory_history, write_memory_snapshot
from ..planning.context import PhaseContext

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps of ``train.profile`` on one rank.

    A trace starts with the first of these steps that this process trains, so a phase that was stopped and resumes
    between them has a second trace. It ends after the last one, or when training ends or is interrupted. The trace
    contains everything in between, including data loading, evaluations and checkpoints.

    Args:
        context: The phase.
    """

    def __init__(self, context: PhaseContext) -> None:
        self.steps, self.total, self.env = context.settings.train.profile, context.planned.steps, context.env
        self.first, self.last = self.steps or (0, 0)
        self.folder: Path = context.folder.path / "profile"
        self.running: profile | None = None
        self.span: record_function | None = None
        self.traced: list[int] = []

    def check_range(self, step: int) -> None:
        """Log the reason if training will run none of the steps to profile.

        Args:
            step: First step that will be trained, counted from 1.
        """
        if self.steps is None or not self.env.is_main:
            return
        if self.first > self.total:
            logger.warning("train.profile = %s: not profiled: the phase has only %d steps", self.steps, self.total)
        elif step > self.last:
            logger.info("train.profile = %s: not profiled: these steps are already done", self.steps)

    def begin(self, step: int) -> None:
        """Begin a step, counted from 1; must be called before its batch is loaded."""
        if self.first <= step <= self.last:
            if self.running is None:
                self._start()
            self.traced.append(step)
            self.span = record_function(f"step {step}")
            self.span.__enter__()

    def end(self, step: int) -> None:
        """End a step. After the last one, write the files."""
        self._end_span()
        if step == self.last:
            self.close()

    def close(self) -> None:
        """End the trace, if one is running, and write the files. If this fails, only log a warning."""
        if self.running is None:
            return
        self._end_span()  # an interrupted step
        running, self.running = self.running, None
        steps, self.traced = f"{self.traced[0]}-{self.traced[-1]}", []
        cuda = self.env.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()  # otherwise the last kernels would be missing
        running.stop()
        trace = self.folder / f"steps-{steps}-rank-{self.env.rank}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if cuda:
                write_memory_snapshot(trace.with_name(trace.name.replace(".json.gz", ".memory.pickle")))
            running.export_chrome_trace(str(trace))
        except (OSError, RuntimeError) as error:
            logger.warning("cannot write the profile of steps %s to %s: %s", steps, self.folder, error)
        else:
            logger.info("profile of steps %s: %s", steps, trace)

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without a GPU, the profiler would print errors about it
        activities = [ProfilerActivity.CPU]
        if self.env.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            record_memory_history()
        self.running = profile(activities=activities, record_shapes=True)
        self.running.start()

    def _end_span(self) -> None:
        if self.span is not None:
            self.span.__exit__(None, None, None)
            self.span = None
