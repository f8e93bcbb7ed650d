"""Replay the metrics of a run to a tracker: read ``metrics.jsonl`` of every phase, and send the missing steps.

Everything is read from the files of the run, so a replay works on any machine that can read them, during training and
afterwards. It may be repeated or interrupted at any time, because the tracker reports which steps it has.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import Recipe
from ...errors import format_count
from ...storage.lease import acquire_lease_when_free
from ...storage.run_directory import PhaseDir, RunDir
from .base import PhaseRecord, TrackedPhase, Tracker, explain_errors

FOLDER = "trackers"  # in the run directory


def tracked_phase(run: RunDir, recipe: Recipe, row: Mapping[str, Any]) -> TrackedPhase:
    """Return the description of a phase for a tracker.

    Its ID is computed from the first event of the run (its creation, with the time) and from the identity and data of
    the phase. A run directory that was moved or renamed therefore keeps its IDs. A copy has the same IDs as long as its
    recipe is unchanged, because it computes the same steps. A fork, or another run of the same recipe, has other IDs.

    Args:
        run: The run directory.
        recipe: Its recipe.
        row: The phase in ``plan.json``.
    """
    number = _digest(run.read_events()[:1])[:10]
    own = _digest([row["key"], row["identity"], row["data"]])[:8]
    config = {"phase": row["key"], "steps": row["steps"], "data.digest": row["data"], "recipe": recipe.name}
    return TrackedPhase(
        id=f"{number}-{row['key'].replace('/', '-')}-{own}",
        key=row["key"],
        title=row["title"],
        group=f"{run.path.name}-{number}",
        config=config | recipe.settings(row["phase"]).flat(),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def summarize(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a result: ``result/top1``, …, ``result/steps``, ``result/seconds``."""
    numbers = {**result, **result["metrics"]}
    return {f"result/{key}": value for key, value in numbers.items() if isinstance(value, int | float)}


@dataclass
class _Position:
    """How far a phase has been replayed.

    Attributes:
        read: Sizes and times of its files when they were last read.
        record: Its open record.
        lease: The lease to release when the record is closed.
        steps: Number of steps in the log.
        added: Number of steps that were added.
        done: Whether its result is recorded.
    """

    read: object = None
    record: PhaseRecord | None = None
    lease: ExitStack = field(default_factory=ExitStack)
    steps: int = 0
    added: int = 0
    done: bool = False


class Replay:
    """Sends the phases of a run to a tracker. Use it in a ``with`` block, which closes all records.

    Args:
        run: The run directory, which has a plan.
        name: Name of the tracker.
        tracker: The tracker.
        keys: Only phases with these keys; None: all.
        patience: Maximum time in seconds to wait for another process that sends the same phase.
    """

    def __init__(
        self, run: RunDir, name: str, tracker: Tracker, keys: Collection[str] | None = None, *, patience: float = 0.0
    ) -> None:
        self.run, self.name, self.tracker, self.keys, self.patience = run, name, tracker, keys, patience
        self.positions: dict[str, _Position] = {}

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        with explain_errors(self.name), ExitStack() as stack:  # closes all records, even if one of them fails
            for position in self.positions.values():
                stack.callback(self._close, position)

    def update(self) -> None:
        """Send the steps and results that the tracker does not have.

        Raises:
            LockedError: Another process is sending the same phase to this tracker.
            ExternalError: The tracker failed.
        """
        for row in self._rows():
            position = self.positions.setdefault(row["key"], _Position())
            folder = self.run.phase(row["phase"], row["module"])
            files = _file_state(folder)
            if files == position.read:
                continue
            result = folder.result  # read before the rows, because it is written after the last row
            steps = {found["step"]: found for found in folder.read_metrics()}
            if steps or result:
                with explain_errors(self.name):
                    self._send(row, position, [steps[step] for step in sorted(steps)], result)
            position.read = files

    @property
    def finished(self) -> bool:
        """Return whether all phases are finished and recorded."""
        rows = self._rows()
        return bool(rows) and all(row["key"] in self.positions and self.positions[row["key"]].done for row in rows)

    def summary(self) -> Iterator[str]:
        """Yield a line per phase that has metrics."""
        for row in self._rows():
            position = self.positions.get(row["key"], _Position())
            if position.steps or position.done:
                state = "finished" if position.done else "not finished"
                yield f"{row['title']}: {state}, {format_count(position.steps, 'step')}, {position.added:,} of them new"

    @property
    def group(self) -> str:
        """Return the group of the phases."""
        return tracked_phase(self.run, self.run.load_recipe(), self._rows()[0]).group

    def _rows(self) -> list[dict[str, Any]]:
        """Return the phases in ``plan.json``, without a baseline that was not requested."""
        rows = self.run.planned_rows
        return [
            row
            for row in rows
            if (self.keys is None or row["key"] in self.keys)
            and (row["phase"] != "end_to_end" or self.run.phase(row["phase"]).path.exists())
        ]

    def _send(
        self, row: dict[str, Any], position: _Position, steps: list[dict[str, Any]], result: dict[str, Any] | None
    ) -> None:
        if position.record is None:
            self._lease(row, position.lease)
            position.record = self.tracker.open(tracked_phase(self.run, self.run.load_recipe(), row))
        position.added += position.record.append(steps)
        position.steps = len(steps)
        position.done = result is not None
        if result is not None:
            position.record.finish(summarize(result))
            self._close(position)

    def _lease(self, row: dict[str, Any], stack: ExitStack) -> None:
        """Prevent other processes from sending the same steps, if this process may write to the run directory."""
        folder = self.run.path / FOLDER / "leases" / f"{self.name}-{row['key'].replace('/', '-')}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            stack.enter_context(acquire_lease_when_free(folder, limit=self.patience))

    @staticmethod
    def _close(position: _Position) -> None:
        with position.lease:
            if position.record is not None:
                position.record.close()
        position.record, position.lease = None, ExitStack()


def follow(replay: Replay, wait: Callable[[], bool]) -> None:
    """Replay a run until it is finished.

    Args:
        replay: The replay.
        wait: Waits a few seconds, and returns whether to stop after one more update.
    """
    replay.update()
    while not replay.finished:
        stop = wait()
        replay.update()
        if stop:
            return


def _file_state(folder: PhaseDir) -> tuple[tuple[int, int, int] | None, ...]:
    """Return a value that changes whenever the log or the result of a phase changes."""
    return tuple(map(_stat, (folder.metrics, folder.path / "DONE")))


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
