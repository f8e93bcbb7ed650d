"""Read the metrics that a phase has logged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .run_directory import PhaseDir


def read_last_metrics(folder: PhaseDir) -> dict[str, Any]:
    """Return the latest value of each metric in the last rows that a phase logged; empty if there are none."""
    values: dict[str, Any] = {}
    for line in _read_tail(folder.metrics).splitlines():
        try:
            values |= json.loads(line)
        except ValueError:
            continue  # the first line may be truncated, and the last line may be incomplete
    return values


def _read_tail(file: Path, size: int = 4096) -> str:
    """Return the last ``size`` bytes of a text file, or an empty string if it cannot be read."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - size))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""
