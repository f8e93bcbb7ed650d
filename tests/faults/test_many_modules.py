"""Forty modules on the real Slurm of this machine, with drawn faults: each is trained once."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from cluster import ARRAY, Cluster, kill, processes
from conftest import Command

from bigincubate.errors import ExternalError
from bigincubate.launchers.slurm.submission_log import QueuedJob, list_queued_jobs
from bigincubate.storage.run_directory import RunDir, is_complete_export

MODULES = 40
REFUSING = """#!/bin/bash
# One of five jobs is refused, and one of five answers gets lost. The first submission of a run is not counted.
case $((RANDOM % 5)) in
  0) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1 ;;
  1) {sbatch} "$@" >/dev/null; echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1 ;;
esac
exec {sbatch} "$@"
"""


def strike(run: RunDir, entry: QueuedJob, draw: random.Random) -> str:
    """Let something happen to a job in the queue. Return what, or an empty string."""
    task = entry.job if entry.module is None else f"{entry.job}_{entry.module % ARRAY}"
    if entry.state == "PENDING" and draw.random() < 0.2:
        subprocess.run(["scontrol", "hold", task], check=False, capture_output=True)
        return "held"
    if entry.state != "RUNNING":
        return ""
    what = draw.choice(["killed", "requeued", "canceled", "gate lost"])
    words = ["resume", "--gate"] if entry.kind == "gate" else ["train"]
    if what == "killed" and (pids := processes(run, *words)):
        kill(draw.choice(pids))
        return what
    if what == "requeued" and entry.kind != "gate":
        subprocess.run(["scontrol", "requeue", task], check=False, capture_output=True)
        return what
    if what == "canceled" or (what == "gate lost" and entry.kind == "gate"):
        subprocess.run(["scancel", task], check=False)
        return what
    return ""


@pytest.mark.slurm
@pytest.mark.parametrize("seed", range(3))
def test_forty_modules_are_trained_once_whatever_happens(
    seed: int, slurm: Cluster, fast: Path, tmp_path: Path, bigincubate: Command
) -> None:
    """Ranks are killed, tasks requeued, canceled and held, gates lost, submissions refused and their answers lost."""
    draw, happened = random.Random(seed), Counter[str]()
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(REFUSING.format(sbatch=shutil.which("sbatch")))
    wrapper.chmod(0o755)
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={wrapper.parent}:$PATH\n")
    run = RunDir(tmp_path / "run")
    depths = str([1] * MODULES)
    sets = [
        *(f"plan.target_depths={depths}", f"plan.meta_depths={depths}", "train.max_steps=2", "data.workers=0"),
        *(f"slurm.setup_script={setup}", "slurm.max_submissions=9", "log.images=0"),
    ]
    command = ["submit", fast, "--run-dir", run.path, *(word for item in sets for word in ("--set", item))]
    env = {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    bigincubate(*command, env=env)

    def proceed() -> bool:
        try:
            queued = list_queued_jobs(run)
        except ExternalError:  # Slurm is busy
            return False
        if is_complete_export(run.exported):
            return True
        for entry in queued:
            if entry.held and draw.random() < 0.3:
                subprocess.run(["scontrol", "release", entry.job], check=False, capture_output=True)
                happened["released"] += 1
        if not any(entry.state in ("PENDING", "RUNNING", "COMPLETING") for entry in queued):
            happened["resumed by a user"] += 1
            bigincubate("resume", run.path, env=env)
        elif draw.random() < 0.1:
            happened[strike(run, draw.choice(queued), draw)] += 1
        time.sleep(1)
        return False

    try:
        slurm.wait(proceed, 3600)
        slurm.wait_empty()
    finally:
        bigincubate("cancel", run.path)
    print(f"seed {seed}: {dict(happened)}")
    for module in range(MODULES):
        states = [attempt["state"] for attempt in run.phase("incubate", module).read_attempts()]
        assert (states[-1], states.count("done")) == ("done", 1), (module, states)
    assert sum(count for what, count in happened.items() if what) >= 5
    assert bigincubate("verify", run.path).returncode == 0
