"""One owner at a time for one phase directory, without any lock of the file system.

``owners/7.json`` is the seventh claim: the process (host, pid, start time, Slurm job) that made it. A claim is a new
file, which exactly one process can create, and its number, the *generation*, is never used again. The highest one
counts. Its file is touched while its owner lives, and emptied when the owner leaves. A later claim is made only where
the owner is provably dead, or has been silent for a lease; if it was alive after all (stopped, or cut off for a while),
it finds the later claim before it writes anything that lasts, and gives up.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..cluster.env import RunEnv, stderr
from ..errors import LockedError
from ..files import read_json, write_text

LEASE = 60.0  # seconds without a sign of life after which an owner of unknown fate is taken for dead
HEARTBEAT = 5.0
QUEUE = 3.0  # seconds in which Slurm must answer
# jobs of which no process runs: ended, or waiting to begin (again)
NOT_RUNNING = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("TIMEOUT", "PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
}


def start_time(pid: int) -> str | None:
    """When a process of this host started (clock ticks since boot), or None where there is none such: with the pid,
    it names a process for good."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def describe(pid: int) -> dict[str, Any]:
    """What tells a process of this host from all others, of the past and of other hosts."""
    env = os.environ
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return {
        "host": socket.gethostname(),
        "space": _space(),
        "pid": pid,
        "started": start_time(pid),
        "cluster": env.get("SLURM_CLUSTER_NAME"),
        "job": f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID"),
        "restarts": int(env.get("SLURM_RESTART_COUNT") or 0),
    }


def _space() -> str | None:
    """Where a pid means this process: this boot, and this pid namespace (containers may share a host's name)."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


class Claim:
    """A generation of the ownership. Without a path, one that nobody can take: of ranks other than 0.

    Attributes:
        lost: a later claim was seen.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.lost = path, False

    @property
    def generation(self) -> int:
        return int(self.path.stem) if self.path else 0

    def held(self) -> bool:
        """Whether there is no later claim. Reads the directory, so that no cache can hide one."""
        if self.path is not None and _newest(self.path.parent) > self.generation:
            self.lost = True
        return not self.lost

    def check(self) -> None:
        """
        Raises:
            LockedError: there is a later claim.
        """
        if self.path is None or self.held():
            return
        folder = self.path.parent
        heir = read_json(folder / f"{_newest(folder)}.json")
        who = _name(heir) if heir else "a process that has left again"
        raise LockedError(f"{folder.parent} was taken over by {who} while this process was silent; it writes no more")

    def leave(self) -> None:
        """Give it back. Its number stays taken. No space on the disk is needed."""
        if self.path is not None:
            with suppress(FileNotFoundError):
                os.truncate(self.path, 0)


@contextmanager
def owned(folder: Path, env: RunEnv) -> Iterator[Claim]:
    """Own ``folder``, for all ranks together, while the block runs. Waits, up to a lease, for the sign of life of an
    owner of which nothing else can be known.

    Raises:
        LockedError: another live process owns it; the message names it. On every rank.
    """
    taken = _take(folder) if env.is_main else ""
    problem = env.broadcast("" if isinstance(taken, Claim) else taken)
    if problem:
        raise LockedError(problem)
    if not isinstance(taken, Claim):
        yield Claim()
        return
    claim, over = taken, threading.Event()
    assert claim.path is not None

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            try:
                os.utime(path)
                claim.held()
            except OSError:
                continue  # a file system that is away for a moment: the lease is longer than that

    path = claim.path
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield claim
    finally:
        over.set()
        thread.join()
        claim.leave()


def _take(folder: Path) -> Claim | str:
    """The next claim, or who stands in its way."""
    owners = folder / "owners"
    owners.mkdir(parents=True, exist_ok=True)
    while True:
        last = _newest(owners)
        before = owners / f"{last}.json"
        if (owner := read_json(before)) and _alive(owner, before):
            return f"{folder} belongs to {_name(owner)}; wait for it, or stop it first"
        mine, me = owners / f"{last + 1}.json", {**describe(os.getpid()), "claim": uuid.uuid4().hex}
        write_text(mine, json.dumps(me, indent=1), exclusive=True)
        # read back: over a network, a file that was made may be reported as one that was there
        if read_json(mine) == me:
            return Claim(mine)


def _newest(owners: Path) -> int:
    return max((int(name[:-5]) for name in os.listdir(owners) if name[:-5].isdecimal()), default=0)


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" + (f", job {owner['job']}" if owner["job"] else "")


def _alive(owner: dict[str, Any], path: Path) -> bool:
    """Whether the owner may still write. What the queue and this host cannot tell, its heartbeat does."""
    me = describe(os.getpid())
    same = {key for key in me if owner[key] == me[key] and me[key] is not None}
    if {"cluster", "job"} <= same and owner["restarts"] < me["restarts"]:
        return False  # our own ghost: Slurm ended it before it started us
    if {"host", "space"} <= same and owner["started"] is not None:
        return start_time(owner["pid"]) == owner["started"]
    began, first = time.monotonic(), _touched(path)
    silent = _now(path.parent) - first
    if silent > LEASE or ("cluster" in same and owner["job"] and _ended(owner["job"])):
        return False
    waiting = False
    while (waited := time.monotonic() - began) + silent <= LEASE:
        if _touched(path) != first:
            return bool(read_json(path))  # or it has left meanwhile
        if not waiting and waited > 2 * HEARTBEAT:
            waiting = True
            left = LEASE - silent - waited
            stderr(f"{path.parent.parent} belonged to {_name(owner)}, which is silent; taking over in {left:.0f} s")
        time.sleep(min(0.2, HEARTBEAT / 4))
    return False


def _touched(path: Path) -> float:
    """The last sign of life; asked of an open file, whose times a network's cache must bring up to date."""
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime


def _now(folder: Path) -> float:
    """The time by the clock that stamps files here, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def _ended(job: str) -> bool:
    """Whether Slurm says that no process of a job runs. False where it does not say."""
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job],
            capture_output=True,
            text=True,
            timeout=QUEUE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    if "Invalid job id" in answer.stderr:
        return True  # ended so long ago that it was forgotten
    states = set(answer.stdout.split())
    return bool(states) and states <= NOT_RUNNING
