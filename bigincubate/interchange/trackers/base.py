"""The interface of trackers. Each tracker is implemented in one file; :mod:`.replay` decides what is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import BigincubateError, ExternalError

Row = Mapping[str, Any]  # a row of metrics.jsonl: ``step``, and the value of each metric


@dataclass(frozen=True)
class TrackedPhase:
    """One phase, or the incubation of one module, which becomes one run in the tracker.

    Attributes:
        id: ID that does not depend on where the run directory is; see :func:`.replay.tracked_phase`.
        key: Key of the phase, such as ``incubate/3``.
        title: Its name in tables, such as ``module 3``.
        group: Name of the group of all phases of the run directory.
        config: The settings of the phase by dotted key.
    """

    id: str
    key: str
    title: str
    group: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the key as the name of a file."""
        return self.key.replace("/", "-")


class PhaseRecord(Protocol):
    """The record of one phase in a tracker, which may have steps from an earlier replay."""

    def append(self, rows: Sequence[Row]) -> int:
        """Record the steps that are missing.

        Args:
            rows: All rows of the phase, by increasing step.

        Returns:
            The number of steps that were missing.
        """

    def finish(self, summary: Mapping[str, float]) -> None:
        """Record the result of a finished phase, unless it has been recorded before."""

    def close(self) -> None:
        """Write buffered data and close all files and connections."""


class Tracker(Protocol):
    """A destination for metrics."""

    def open(self, phase: TrackedPhase) -> PhaseRecord:
        """Open the record of a phase, and create it if it is missing."""

    def describe(self, group: str) -> str:
        """Return a line for the user: where the metrics of a run are, and what to do next."""


@contextmanager
def explain_errors(name: str) -> Iterator[None]:
    """Convert errors of a tracker's package, which may be of any class, to one line.

    Raises:
        ExternalError: The package raised an error.
    """
    try:
        yield
    except (BigincubateError, OSError):
        raise
    except Exception as error:
        text = (str(error).strip() or repr(error)).splitlines()[0]
        raise ExternalError(f"{name}: {text}") from error
