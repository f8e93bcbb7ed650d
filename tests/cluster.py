"""A real Slurm on this machine for tests: three virtual nodes, and what can go wrong with them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigincubate.launchers.slurm.submission_log import QueuedJob, list_queued_jobs
from bigincubate.storage.run_directory import PhaseDir, RunDir

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
ARRAY = 2  # the cluster's MaxArraySize
SLOW = 600  # seconds, on a machine that does other things too


class Cluster:
    def __init__(self, folder: Path, *conf: str) -> None:
        self.folder = folder  # Slurm's sockets need a short name
        self.conf = "\n".join(conf)
        self.control("start", 3)
        self.before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")

    def close(self) -> None:
        del os.environ["SLURM_CONF"]
        if self.before:
            os.environ["SLURM_CONF"] = self.before
        self.control("stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def control(self, *words: object) -> None:
        ended = subprocess.run(
            ["bash", SCRIPT, *map(str, words), str(self.folder)],
            env={**os.environ, "SC_EXTRA_CONF": self.conf, "SC_TIMEOUT": "120"},
            capture_output=True,
            text=True,
            timeout=SLOW,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr

    def wait(self, what: Callable[[], Any], seconds: float = SLOW) -> Any:
        """What ``what`` gives, once it is true. Meanwhile no job may wait for what cannot come.

        Slurm cancels modules whose meta model failed, at its next look.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            stuck = [
                line for line in say("squeue", "--noheader", "--format=%r %j").splitlines() if "-incubate" not in line
            ]
            assert not any(line.startswith("DependencyNeverSatisfied") for line in stuck), say("squeue")
            time.sleep(0.2)
        raise AssertionError(f"waited in vain\n{say('squeue')}")

    def wait_empty(self) -> None:
        self.wait(lambda: not say("squeue", "--noheader"))

    def down(self, node: str) -> bool:
        return "down" in say("sinfo", "--noheader", "--nodes", node, "--format=%T")


def start(*conf: str, name: str = "", files: dict[str, str] | None = None) -> Iterator[Cluster]:
    """For a fixture: the cluster, or a skip that says why not; where CI=1, an error.

    Args:
        conf: Lines of slurm.conf; ``{etc}``, here and in files, is its folder.
        name: Distinguishes clusters of this process.
        files: Text of programs and scripts beside slurm.conf, by name.
    """
    if MISSING:
        reason = f"needs Slurm ({', '.join(MISSING)} missing): apt-get install slurm-wlm munge"
        if os.environ.get("CI") in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(f"/tmp/slurm-{os.getpid()}{name}")
    etc = folder / "etc"
    for file, text in (files or {}).items():
        etc.mkdir(parents=True, exist_ok=True)
        (etc / file).write_text(text.replace("{etc}", str(etc)))
        (etc / file).chmod(0o755)
    cluster = Cluster(folder, *(line.replace("{etc}", str(etc)) for line in conf or [f"MaxArraySize={ARRAY}"]))
    try:
        yield cluster
    finally:
        cluster.close()


def say(*words: str) -> str:
    """What a program of Slurm prints; nothing while it gets no answer."""
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120).stdout


def words(*sets: str) -> list[str]:
    """The options of a command that change these keys of its recipe."""
    return [word for item in sets for word in ("--set", item)]


def jobs(run: RunDir) -> list[dict[str, Any]]:
    """What was submitted, oldest first."""
    found: list[dict[str, Any]] = json.loads((run.path / "jobs.json").read_text())["jobs"]
    return found


def kinds(run: RunDir) -> list[str]:
    return [job["kind"] for job in jobs(run)]


def committed(folder: PhaseDir) -> int:
    return len(list(folder.checkpoints.glob("step-*/COMMITTED")))


def processes(run: RunDir, *words: str) -> list[int]:
    """Pids of this program's processes for a run, on any virtual node, whose command line has these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = [word.decode() for word in (folder / "cmdline").read_bytes().split(b"\0")]
            if line[1:3] == ["-m", "bigincubate"] and {str(run.path), *words} <= set(line):
                found.append(int(folder.name))
    return found


def ranks(run: RunDir, phase: str, module: int | None = None) -> list[int]:
    return processes(run, "train", phase, *(["--module", str(module)] if module is not None else []))


def running(run: RunDir, key: str) -> QueuedJob | None:
    """The job of a phase, where it runs."""
    return next((entry for entry in list_queued_jobs(run) if entry.key == key and entry.state == "RUNNING"), None)


def nodes(entry: QueuedJob) -> list[str]:
    return say("scontrol", "show", "hostnames", entry.node).split()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
