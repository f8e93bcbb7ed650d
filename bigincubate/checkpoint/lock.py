"""One owner for one phase directory.

``OWNER`` names the process (host, pid, start time, Slurm job) and is touched while it lives. On the same host a dead
owner is recognised at once; on another host its lease must run out first.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cluster.env import RunEnv
from ..errors import LockedError
from ..files import read_json, write_json

LEASE = 60.0  # seconds without a sign of life after which an owner on another host is taken for dead
HEARTBEAT = 10.0


def start_time(pid: int) -> str | None:
    """When a process of this host started (clock ticks since boot), or None where there is none such: with the pid,
    it names a process for good."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


@contextmanager
def owned(folder: Path, env: RunEnv) -> Iterator[None]:
    """Own ``folder``, for all ranks together, while the block runs.

    Raises:
        LockedError: another live process owns it; the message names it. On every rank.
    """
    problem = env.broadcast(_take(folder) if env.is_main else None)
    if problem:
        raise LockedError(problem)
    if not env.is_main:
        yield
        return
    path, over = folder / "OWNER", threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            try:
                os.utime(path)
            except OSError:
                continue  # a file system that is away for a moment: the lease is longer than that

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        path.unlink(missing_ok=True)


def _take(folder: Path) -> str | None:
    """Make this process the owner; or who is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "OWNER"
    pid = os.getpid()
    me = {"host": socket.gethostname(), "pid": pid, "started": start_time(pid), "job": os.environ.get("SLURM_JOB_ID")}
    with (folder / ".owner.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        owner = read_json(path)
        if owner and _alive(owner, path):
            job = f", job {owner['job']}" if owner["job"] else ""
            return f"{folder} belongs to process {owner['pid']} on {owner['host']}{job}; wait for it, or stop it first"
        write_json(path, me)
    return None


def _alive(owner: dict[str, Any], path: Path) -> bool:
    if owner["host"] == socket.gethostname() and owner["started"] is not None:
        return start_time(owner["pid"]) == owner["started"]
    return time.time() - path.stat().st_mtime < LEASE
