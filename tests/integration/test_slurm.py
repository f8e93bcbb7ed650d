"""On a real Slurm of three virtual nodes. The whole run with faults is in `tests/faults/test_cluster.py`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from cluster import ARRAY, Cluster, committed, jobs, kinds, running, say, words
from conftest import Command

from bigincubate.config.resources import resource_folder
from bigincubate.launchers.slurm.submission_log import list_queued_jobs
from bigincubate.storage.run_directory import RunDir

LONG = pytest.mark.slurm


def exported(run: RunDir) -> bool:
    return (run.path / "export" / "model.safetensors").exists()


@pytest.fixture
def run(tmp_path: Path, bigincubate: Command, slurm: Cluster) -> Any:
    """A run directory, of which nothing is in the queue in the end."""
    made = RunDir(tmp_path / "run")
    yield made
    if made.recipe_file.exists():
        bigincubate("cancel", made.path)


def test_two_submits_at_the_same_moment_make_one_run(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command
) -> None:
    """With more modules than an array of this cluster holds, and a limit to how many train at a time."""
    sets = words(
        "plan.target_depths=[1,1,1]", "plan.meta_depths=[1,1,1]", "slurm.array_parallelism=1", "slurm.extra=['--hold']"
    )
    command = [sys.executable, "-m", "bigincubate", "submit", str(fast), "--run-dir", str(run.path), *sets]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(process.communicate(timeout=300), process.returncode) for process in racing]
    assert sorted(code for _, code in ended)[0] == 0, ended
    assert {code for _, code in ended} <= {0, 7}, ended
    assert kinds(run) == ["pretrain", "incubate", "incubate", "gate"]
    first, rest = (job for job in jobs(run) if job["kind"] == "incubate")
    assert (first["modules"], rest["modules"]) == ([0, 1], [2])
    assert ARRAY == 2
    assert rest["needs"] == [jobs(run)[0]["job"], first["job"]]
    assert Counter(entry.key for entry in list_queued_jobs(run)) == Counter(
        ["pretrain", "incubate/0", "incubate/1", "incubate/2", "gate"]
    )
    rows = json.loads(bigincubate("status", run.path, "--json").stdout)
    assert rows[0]["queue"] == "PENDING (JobHeldUser)"
    assert [row["state"] for row in rows] == ["held"] * 4 + ["waiting", "held"]
    assert "PENDING (JobHeldUser)" in bigincubate("status", run.path).stdout
    again = bigincubate("submit", fast, "--run-dir", run.path, *sets)
    assert (again.returncode, len(jobs(run))) == (0, 4)
    assert "in the queue already" in again.stdout
    assert "canceled: " in bigincubate("cancel", run.path).stdout
    slurm.wait(lambda: not list_queued_jobs(run))


@LONG
def test_job_near_its_time_limit_checkpoints_and_requeues(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command
) -> None:
    sets = words(
        "train.max_steps=1500", "checkpoint.every_steps=10000", "slurm.time=0:01:00", "slurm.extra=['--signal=USR2@20']"
    )
    assert bigincubate("submit", fast, "--run-dir", run.path, *sets).returncode == 0
    folder = run.phase("pretrain")
    slurm.wait(lambda: folder.result)
    attempts = folder.read_attempts()
    assert len(attempts) > 1
    assert [attempt["state"] for attempt in attempts] == ["preempted"] * (len(attempts) - 1) + ["done"]
    assert len({attempt["job"] for attempt in attempts}) == 1


@LONG
def test_module_that_failed_is_submitted_again_by_the_gate_alone(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command
) -> None:
    blocked = run.path / "modules" / "01"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("no directory")  # module 1 cannot be trained
    sets = words("train.max_steps=2", "data.workers=1")
    # at a site whose jobs get no environment: what they need is in their arguments
    submitted = bigincubate("submit", fast, "--run-dir", run.path, *sets, env={"SBATCH_EXPORT": "NONE"})
    assert submitted.returncode == 0, submitted.stderr
    slurm.wait(
        lambda: run.phase("pretrain").result and "incubate/1" not in {entry.key for entry in list_queued_jobs(run)}
    )
    blocked.unlink()
    slurm.wait(lambda: exported(run) and not list_queued_jobs(run))
    assert kinds(run) == ["pretrain", "incubate", "gate", "incubate", "gate", "finetune", "gate"]
    assert jobs(run)[3]["modules"] == [1]
    assert len(run.phase("incubate", 0).read_attempts()) == 1
    logs = [line for line in bigincubate("logs", run.path).stdout.splitlines() if line.startswith("==> ")]
    kind = [re.sub(r".*bigincubate-([a-z]+).*", r"\1", line) for line in logs]
    assert [name for name, _ in groupby(kind)] == ["pretrain", "incubate", "finetune", "gate"]
    assert "Traceback" not in bigincubate("logs", run.path, "--module", 0, "--lines", 999).stdout


@LONG
def test_expanded_model_is_fine_tuned_on_two_nodes_and_exported(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command
) -> None:
    sets = words("train.max_steps=4", "data.workers=1", "slurm.finetune.nodes=2", "finetune.sharding.strategy=fsdp2")
    submitted = bigincubate("submit", fast, "--run-dir", run.path, "--method", "expand", *sets)
    assert submitted.returncode == 0, submitted.stderr
    assert kinds(run) == ["pretrain", "gate"]
    slurm.wait(lambda: exported(run) and not list_queued_jobs(run))
    assert kinds(run)[2] == "finetune"
    assert "incubate" not in kinds(run)
    assert [attempt["world"] for attempt in run.phase("finetune").read_attempts()] == [2]
    assert [row["phase"] for row in json.loads(bigincubate("status", run.path, "--json").stdout)] == [
        "pretrain",
        "finetune",
    ]
    verified = bigincubate("verify", run.path)
    assert verified.returncode == 0, verified.stdout + verified.stderr


@LONG
def test_repeatedly_failing_module_is_given_up_and_resumed_by_hand(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command
) -> None:
    blocked = run.path / "modules" / "01"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("no directory")
    sets = words("slurm.max_submissions=2", "train.max_steps=2")
    assert bigincubate("submit", fast, "--run-dir", run.path, *sets).returncode == 0
    slurm.wait(lambda: not list_queued_jobs(run))
    logs = "".join(file.read_text() for file in sorted((run.path / "slurm").glob("*gate*.out")))
    assert "given up: module 1: submitted 2 times" in logs
    assert run.phase("incubate", 0).result is not None
    blocked.unlink()
    assert bigincubate("resume", run.path).returncode == 0
    slurm.wait(lambda: exported(run) and not list_queued_jobs(run))
    assert jobs(run)[5]["modules"] == [1]


@LONG
def test_site_without_sbatch_in_jobs_gets_the_command(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command
) -> None:
    sets = words("slurm.submit_from_jobs=false", "train.max_steps=2")
    assert bigincubate("submit", fast, "--run-dir", run.path, *sets).returncode == 0
    slurm.wait(lambda: not list_queued_jobs(run))
    logs = "".join(file.read_text() for file in (run.path / "slurm").glob("*gate*.out"))
    assert f"missing: fine-tuning; continue with: bigincubate resume {run.path}" in logs
    assert bigincubate("resume", run.path).returncode == 0
    slurm.wait(lambda: exported(run) and not list_queued_jobs(run))
    assert kinds(run) == ["pretrain", "incubate", "gate", "finetune", "gate"]


@LONG
def test_controller_restart_cancel_and_resume(slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command) -> None:
    """`slurmctld` restarts; `scancel` of a running job (no requeue: its gate submits it again); `cancel`; `resume`."""
    sets = words("checkpoint.every_steps=1", "train.max_steps=1500", "log.images=0")
    assert bigincubate("submit", fast, "--run-dir", run.path, *sets).returncode == 0
    folder = run.phase("pretrain")
    slurm.wait(lambda: committed(folder))
    slurm.control("restart-ctld")
    entry = slurm.wait(lambda: running(run, "pretrain"))
    subprocess.run(["scancel", entry.job], check=True)
    slurm.wait(lambda: kinds(run).count("pretrain") == 2)
    assert "requeued" not in "".join(file.read_text() for file in (run.path / "slurm").glob("*pretrain*.out"))
    slurm.wait(lambda: running(run, "pretrain") and len(folder.read_attempts()) == 2)
    row = json.loads(bigincubate("status", run.path, "--json").stdout)[0]
    entry = slurm.wait(lambda: running(run, "pretrain"))
    assert (row["queue"], row["node"], row["restarts"]) == ("RUNNING", entry.node, 1)
    assert "canceled: " in bigincubate("cancel", run.path).stdout
    slurm.wait(lambda: not list_queued_jobs(run))
    assert "no jobs in the queue" in bigincubate("cancel", run.path).stdout
    assert folder.result is None
    assert "pretrain" in bigincubate("logs", run.path).stdout
    assert "JobState=CANCELLED" in say("scontrol", "show", "job", entry.job)
    assert bigincubate("resume", run.path).returncode == 0
    assert slurm.wait(lambda: running(run, "pretrain"))


@LONG
def test_site_that_replaces_sbatch_and_has_no_python_on_its_nodes(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command, tmp_path: Path
) -> None:
    """An `sbatch` that ignores --parsable and prints banners; jobs whose interpreter does not exist leave a trace."""
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    real = shutil.which("sbatch")
    wrapper.write_text(f'#!/bin/bash\necho "*** 3 nodes ***"\n{real} "${{@:2}}"\necho "quota: 7 jobs"\n')
    wrapper.chmod(0o755)
    sets = words("slurm.python=/nowhere/python", "slurm.max_requeues=0", "train.max_steps=2")
    path = f"{wrapper.parent}:{os.environ['PATH']}"
    submitted = bigincubate("submit", fast, "--run-dir", run.path, *sets, env={"PATH": path})
    assert submitted.returncode == 0, submitted.stderr
    assert kinds(run) == ["pretrain", "incubate", "gate"]
    slurm.wait(lambda: not list_queued_jobs(run))
    rows = json.loads(bigincubate("status", run.path, "--json").stdout)
    assert [row["state"] for row in rows] == ["failed", "waiting", "waiting", "waiting", "missing"]
    rows = [row for row in rows if row["state"] != "waiting"]
    assert all("cannot start bigincubate: " in row["error"] and "/nowhere/python" in row["error"] for row in rows)


@LONG
def test_scripts_are_usable_by_hand(slurm: Cluster, run: RunDir, fast: Path) -> None:
    scripts = resource_folder("slurm")
    more = words("train.max_steps=2")
    for phase in ("pretrain", "incubate"):
        array = ["--array=0-1"] if phase == "incubate" else []
        logs = ["--output", str(run.path.parent / "%x_%A_%a.out")]
        script = scripts / "phase.sbatch"
        command = ["sbatch", "--wait", *array, *logs, str(script), phase, str(fast), str(run.path), *more]
        environment = {**os.environ, "PYTHON": sys.executable}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert ended.returncode == 0, ended.stderr
    assert all(run.phase("incubate", module).result for module in (0, 1))
