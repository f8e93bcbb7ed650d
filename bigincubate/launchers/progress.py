"""Progress of running phases on the console: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..planning.job_graph import Job
from ..storage.run_directory import PhaseDir


class ProgressReporter:
    """Prints the progress of jobs. Use it as a context manager.

    Attributes:
        failures: One line for each job that has failed.
    """

    def __init__(self, console: Console) -> None:
        """Create a reporter that prints to ``console``."""
        self.console = console
        self.bars: dict[str, TaskID] = {}
        self.tenths: dict[str, int] = {}
        self.failures: list[str] = []
        self.progress = Progress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f}%  {task.completed:>5.0f}/{task.total:.0f} steps", markup=False),
            TextColumn("{task.fields[note]:<26}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> ProgressReporter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars. The text is not read as markup."""
        self.progress.console.print(Text(text), soft_wrap=True)

    def started(self, job: Job) -> None:
        """Report that a job has started."""
        if self.console.is_terminal:
            self.bars[job.key] = self.progress.add_task(job.title, total=max(job.steps, 1), note="starting")
        else:
            self.say(f"{job.title}: started")

    def update(self, running: list[tuple[Job, PhaseDir]]) -> None:
        """Report the latest metrics of the running jobs; without a terminal, only after each tenth of a phase."""
        for job, folder in running:
            row = folder.read_last_metrics()
            if "train/loss" not in row:
                continue
            note = f"loss {row['train/loss']:.3f}  {row[f'perf/{job.unit}_per_sec']:.0f} {job.unit}/s"
            if self.console.is_terminal:
                self.progress.update(self.bars[job.key], completed=row["step"], note=note)
            elif (tenth := 10 * row["step"] // max(job.steps, 1)) > self.tenths.get(job.key, 0):
                self.tenths[job.key] = tenth
                self.say(f"{job.title}: step {row['step']} of {job.steps}, {note}")

    def done(self, job: Job, result: dict[str, Any]) -> None:
        """Report that a job is done, with its result."""
        headline = job.metrics[0]
        note = f"{headline.title} {headline.text(headline.value_in(result), unit=True)}"
        if self.console.is_terminal:
            self.progress.update(self.bars[job.key], completed=max(job.steps, 1), note=note)
        else:
            self.say(f"{job.title}: done, {note}")

    def failed(self, job: Job, code: int, line: str, log: Path) -> None:
        """Report that a job has failed, with its exit code, the reason and the log file."""
        self.failures.append(f"{job.title}: {line.removeprefix('bigincubate: ')} (log: {log})")
        self.say(f"{job.title}: failed (exit {code}): {line}\n  log: {log}")
