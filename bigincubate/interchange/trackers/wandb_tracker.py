"""Write metrics for W&B: by default offline, to files that ``wandb sync`` uploads."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingDependencyError, SystemResourceError
from ...files import make_folder, quote_path
from .base import Row, TrackedPhase

MODE_VARIABLE = "WANDB_MODE"


class WandbTracker:
    """Writes one W&B run per phase, offline unless the environment variable ``WANDB_MODE`` selects another mode.

    Args:
        folder: The folder in which W&B creates its own folder, ``wandb``.
        project: Name of the project.

    Raises:
        MissingDependencyError: W&B is not installed.
    """

    def __init__(self, folder: Path, project: str) -> None:
        try:
            import wandb

            wandb.init  # noqa: B018  # a folder named wandb, which W&B creates, can be imported as an empty package
        except (ImportError, AttributeError) as error:
            raise MissingDependencyError(f"this needs W&B ({error}); install it: pip install wandb") from None
        self.folder, self.project = folder, project
        self.mode = os.environ.get(MODE_VARIABLE) or "offline"
        make_folder(folder)

    def open(self, phase: TrackedPhase) -> WandbRecord:
        """Open the run of a phase."""
        return WandbRecord(phase, self.folder, self.project, self.mode)

    def describe(self, group: str) -> str:
        """Return how to upload the files, or where the runs are."""
        if self.mode != "offline":
            return f"W&B ({self.mode}): project {self.project!r}, group {group!r}"
        pattern = f"{quote_path(self.folder)}/wandb/offline-run-*-{group.rpartition('-')[2]}-*"
        return f"W&B, offline: project {self.project!r}, group {group!r}; upload with: wandb sync {pattern}"


class WandbRecord:
    """The W&B run of one phase. W&B accepts only increasing steps, so only steps after the last recorded one are sent.

    The last step is read from the files of earlier replays and, in online mode, also from the server. Each replay with
    new steps writes another folder with the same run ID, and ``wandb sync`` appends these folders to the run in order.

    Args:
        phase: The phase.
        folder: The folder that contains W&B's own folder.
        project: Name of the project.
        mode: Mode of W&B.

    Raises:
        SystemResourceError: A file of an earlier replay cannot be read.
    """

    def __init__(self, phase: TrackedPhase, folder: Path, project: str, mode: str) -> None:
        self.phase, self.folder, self.project, self.mode = phase, folder, project, mode
        self.run: Any = None
        self.last, self.summary = -1, set[str]()
        from ...compat.wandb import read_recorded

        for file in folder.glob(f"wandb/*run-*-{phase.id}/run-{phase.id}.wandb"):
            try:
                last, keys = read_recorded(file)
            except (OSError, ValueError) as error:
                raise SystemResourceError(f"{file}: {error}; move its folder away to record the phase again") from None
            self.last, self.summary = max(self.last, last), self.summary | keys

    def append(self, rows: Sequence[Row]) -> int:
        """Record the rows after the last recorded step."""
        if self.mode != "offline" and any(row["step"] > self.last for row in rows):
            self.last = max(self.last, self._start().step - 1)  # the server may have steps of other machines
        missing = [row for row in rows if row["step"] > self.last]
        for row in missing:
            values = {key: value for key, value in row.items() if key != "step"}
            self._start().log(values, step=row["step"], commit=True)
            self.last = row["step"]
        return len(missing)

    def finish(self, summary: Mapping[str, float]) -> None:
        """Record the result in the summary of the run."""
        if not summary.keys() <= self.summary:
            self._start().summary.update(dict(summary))
            self.summary |= summary.keys()

    def close(self) -> None:
        """Finish the run of this process, which writes or uploads what is buffered."""
        if self.run is not None:
            self.run.finish()
            self.run = None

    def _start(self) -> Any:
        if self.run is None:
            import wandb

            from ...compat.wandb import quiet_settings

            # W&B names its folder by the current second, and would overwrite that of a replay in the same second
            while any(self.folder.glob(f"wandb/*-{time.strftime('%Y%m%d_%H%M%S')}-{self.phase.id}")):
                time.sleep(0.05)
            self.run = wandb.init(
                project=self.project,
                id=self.phase.id,
                name=f"{self.phase.group}/{self.phase.key}",
                group=self.phase.group,
                job_type=self.phase.key.partition("/")[0],
                config=dict(self.phase.config),
                dir=str(self.folder),
                mode=self.mode,
                resume="allow",
                reinit="create_new",
                settings=quiet_settings(),
            )
        return self.run
