"""Find the logs of a run's Slurm jobs."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from ...config.slurm import JOB_KINDS
from ...files import read_small_file, write_text
from ...storage.run_directory import RunDir

LOG_PREFIX = "bigincubate-"
LOG_NAME = re.compile(
    rf"{LOG_PREFIX}(?P<kind>[a-z_]+)(?:\+(?P<offset>\d+))?_(?P<job>\d+)(?:_(?P<index>\d+))?(?:\.(?P<rank>\d+))?\.out"
)


def list_job_logs(run: RunDir, module: int | None = None) -> list[Path]:
    """Return the logs of jobs and of their ranks, of the whole run or of one module, in the order of the pipeline.

    A job is followed by its ranks, and a job that was submitted again by the later one.
    """
    found = []
    for file in (run.path / "slurm").glob(f"{LOG_PREFIX}*.out"):
        if (name := LOG_NAME.fullmatch(file.name)) is None or name["kind"] not in JOB_KINDS:
            continue
        own = None
        if name["kind"] == "incubate":  # a cluster without arrays has jobs with an offset and no index
            own = int(name["offset"] or 0) + int(name["index"] or 0)
        if module in (None, own):
            order = JOB_KINDS.index(name["kind"]), -1 if own is None else own, int(name["job"]), int(name["rank"] or -1)
            found.append((order, file))
    return [file for _, file in sorted(found)]


def read_job_trace(run: RunDir, key: str) -> str:
    """Return why the last job of a phase, or the gate, could not start bigincubate; empty if it could.

    The scripts in ``slurm/`` write and remove this file.
    """
    try:
        text = read_small_file(run.path / "slurm" / f"{key.replace('/', '-')}.error").decode(errors="replace")
    except OSError:
        return ""
    return text.strip()


def write_gate_trace(run: RunDir, job: str, text: str) -> None:
    """Record why the gate could not submit jobs; removed when a gate starts again."""
    write_text(run.path / "slurm" / "gate.error", f"job {job} on {socket.gethostname()}: {text}\n")


def count_gate_failures(run: RunDir) -> int:
    """Return how many times in a row the gate has failed and was requeued; the script of the gate writes the file."""
    try:
        return len(read_small_file(run.path / "slurm" / "gate.exits").split())
    except OSError:
        return 0
