"""Write metrics to CSV files: one file per phase, one column per metric. This needs no package."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ...files import quote_path, read_json, write_json, write_text
from .base import Row, TrackedPhase

Columns = dict[str, None]  # names in the order of their first appearance


class CsvTracker:
    """Writes ``GROUP/PHASE.csv``, and ``GROUP/PHASE.json`` with the settings and the result.

    Args:
        folder: The folder of all groups.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, phase: TrackedPhase) -> CsvRecord:
        """Open the file of a phase."""
        return CsvRecord(phase, self._group_folder(phase.group))

    def describe(self, group: str) -> str:
        """Return where the files are."""
        return f"CSV files: {quote_path(self._group_folder(group))}"

    def _group_folder(self, group: str) -> Path:
        """Return the folder of a group. It keeps its first name, even if the run directory is renamed."""
        name = group.rpartition("-")[2]
        return next((path for path in sorted(self.folder.glob("*")) if path.name.endswith(f"-{name}")), None) or (
            self.folder / group
        )


class CsvRecord:
    """The files of one phase. The table is always replaced as a whole, so it has exactly the steps of the log.

    Args:
        phase: The phase.
        folder: The folder of the files.
    """

    def __init__(self, phase: TrackedPhase, folder: Path) -> None:
        self.phase, self.table = phase, folder / f"{phase.name}.csv"
        self.about = self.table.with_suffix(".json")
        self._describe({})

    def append(self, rows: Sequence[Row]) -> int:
        """Write the table if it has changed, and return the number of new steps."""
        columns: Columns = {"step": None}
        for row in rows:
            columns |= dict.fromkeys(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        before = ""
        with suppress(OSError, ValueError):
            before = self.table.read_text()
        if before == text.getvalue():
            return 0
        write_text(self.table, text.getvalue())
        known = {row.get("step") for row in csv.DictReader(io.StringIO(before))}
        return sum(str(row["step"]) not in known for row in rows)

    def finish(self, summary: Mapping[str, float]) -> None:
        """Write the result."""
        self._describe(summary)

    def close(self) -> None:
        """Do nothing: every file is complete."""

    def _describe(self, summary: Mapping[str, float]) -> None:
        phase = self.phase
        content = {
            "id": phase.id,
            "phase": phase.key,
            "title": phase.title,
            "config": dict(phase.config),
            "summary": dict(summary),
        }
        if read_json(self.about) != content:
            write_json(self.about, content)
