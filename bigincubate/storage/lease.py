"""Leases: one owner at a time for a directory, without file-system locks.

``owners/7.json`` is the seventh lease on the directory; it identifies the process (host, pid, start time, batch job)
that created it. Exactly one process can create a file, and its number, called the *generation*, is never reused; the
highest generation is the valid lease. While the owner runs, it updates the modification time of its file (the
heartbeat), and when it ends, it empties the file. A new lease is created only if the owner has certainly ended, or has
sent no heartbeat for ``LEASE_SECONDS``. An owner that was only suspended or disconnected checks for a later lease
before it commits anything, and stops if there is one.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LockedError
from ..files import read_json, write_text
from .record_types import Types, has_types

if TYPE_CHECKING:
    from ..distributed.process_group import DistributedContext

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0  # seconds without a heartbeat after which an owner of unknown state counts as ended
HEARTBEAT_SECONDS = 5.0  # seconds between heartbeats


OWNER_TYPES: Types = {
    "host": str,
    "space": str | None,
    "pid": int,
    "started": str | None,
    "user": int,
    "cluster": str | None,
    "job": str | None,
    "restarts": int,
}


class JobQueue:
    """Queries of leases to a batch system. This class has no jobs; :mod:`bigincubate.launchers.slurm` asks Slurm."""

    def current_job(self) -> dict[str, Any]:
        """Return the job of this process: ``cluster``, ``job`` (its id, or None), and the number of ``restarts``."""
        return {"cluster": None, "job": None, "restarts": 0}

    def has_ended(self, job: str) -> bool:
        """Return whether it is certain that no process of ``job``, a job of this cluster, is running."""
        return False


NO_JOBS = JobQueue()


def process_start_time(pid: int) -> str | None:
    """Return when a process of this host started (clock ticks since boot), or None if it is not running.

    Start time and pid together identify a process, even if the pid is reused.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def describe_process(pid: int, queue: JobQueue = NO_JOBS) -> dict[str, Any]:
    """Return fields that together identify a process of this host uniquely, over time and all hosts."""
    return {
        "host": socket.gethostname(),
        "space": _pid_namespace(),
        "pid": pid,
        "started": process_start_time(pid),
        "user": os.geteuid(),
        **queue.current_job(),
    }


def _pid_namespace() -> str | None:
    """Return an identifier of this boot and pid namespace, because containers may have the same host name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


class Lease:
    """A lease on a directory, held by rank 0.

    Other ranks have a lease without a path, which is never lost.

    Attributes:
        path: The file of the lease.
        lost: Whether a later lease was found.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.lost = path, False

    @property
    def generation(self) -> int:
        """Return the number of the lease; 0 without a path."""
        return int(self.path.stem) if self.path else 0

    def is_held(self) -> bool:
        """Return whether there is no later lease. Lists the directory, because a file lookup may be cached."""
        if self.path is not None and _newest_generation(self.path.parent) > self.generation:
            self.lost = True
        return not self.lost

    def check(self) -> None:
        """Check that the lease is still held.

        Raises:
            LockedError: There is a later lease.
        """
        if self.path is None or self.is_held():
            return
        folder = self.path.parent
        new_owner = _read_owner(folder / f"{_newest_generation(folder)}.json")
        name = _describe_owner(new_owner) if new_owner else "a process that has since ended"
        raise LockedError(
            f"{folder.parent} was taken over by {name} while this process sent no heartbeat; this process stops"
        )

    def release(self) -> None:
        """Release the lease, which needs no free disk space. Its number is not reused."""
        if self.path is not None:
            with suppress(FileNotFoundError):
                os.truncate(self.path, 0)


@contextmanager
def acquire_lease(folder: Path, env: DistributedContext | None = None, queue: JobQueue = NO_JOBS) -> Iterator[Lease]:
    """Hold the lease on ``folder`` for all ranks together while the block runs.

    Wait for up to ``LEASE_SECONDS`` if only its heartbeat can show whether the previous owner is running.

    Args:
        folder: The directory.
        env: The ranks; None for a single process, which needs no torch.
        queue: The batch system that may have started this process or the previous owner.

    Raises:
        LockedError: Another running process, which the message names, owns the folder. Raised on every rank.
    """
    lease, finished = Lease(), threading.Event()
    with env.main_process_first() if env else nullcontext():
        if env is None or env.is_main:
            lease = _acquire_alone(folder, queue)
    if (path := lease.path) is None:
        yield lease
        return

    def send_heartbeats() -> None:
        while not finished.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(path)
                lease.is_held()
            except OSError:
                continue  # the file system may be unavailable for less than LEASE_SECONDS

    thread = threading.Thread(target=send_heartbeats, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        finished.set()
        thread.join()
        lease.release()


@contextmanager
def acquire_lease_when_free(folder: Path, queue: JobQueue = NO_JOBS, limit: float = LEASE_SECONDS) -> Iterator[Lease]:
    """Hold the lease on ``folder`` in one process; wait while another process holds it.

    Args:
        folder: The directory.
        queue: The batch system that may have started this process or the previous owner.
        limit: Seconds to wait.

    Raises:
        LockedError: Another running process still owns the folder after that time.
    """
    started, announced = time.monotonic(), False
    with ExitStack() as stack:
        while True:
            try:
                lease = stack.enter_context(acquire_lease(folder, queue=queue))
                break
            except LockedError as error:
                waited = time.monotonic() - started
                if waited > limit:
                    raise
                if waited > 1 and not announced:
                    logger.warning("waiting: %s", error)
                    announced = True
                time.sleep(0.05 if waited < 1 else 1)
        yield lease


def _acquire_alone(folder: Path, queue: JobQueue = NO_JOBS) -> Lease:
    """Return a new lease of this process.

    Raises:
        LockedError: Another running process, which the message names, owns the folder.
    """
    owners = folder / "owners"
    owners.mkdir(parents=True, exist_ok=True)
    while True:
        last = _newest_generation(owners)
        last_path = owners / f"{last}.json"
        if (owner := _read_owner(last_path)) and _wait_whether_alive(owner, last_path, queue):
            raise LockedError(f"{folder} belongs to {_describe_owner(owner)}; wait for it, or stop it first")
        path = owners / f"{last + 1}.json"
        content = {**describe_process(os.getpid(), queue), "claim": uuid.uuid4().hex}
        write_text(path, json.dumps(content, indent=1), exclusive=True)
        # read it back: a network file system may report a file that was just created as one that already existed
        if read_json(path) == content:
            return Lease(path)


def _newest_generation(owners: Path) -> int:
    return max((int(name[:-5]) for name in os.listdir(owners) if name[:-5].isdecimal()), default=0)


def _read_owner(path: Path) -> dict[str, Any] | None:
    """Return the owner that a file names, or None if that owner has released the lease or the file is damaged."""
    owner = read_json(path)
    return owner if has_types(owner, OWNER_TYPES) else None


def _describe_owner(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" + (f", job {owner['job']}" if owner["job"] else "")


def current_owner(folder: Path, queue: JobQueue = NO_JOBS) -> str | None:
    """Return the name of the process that owns ``folder``, or None, without waiting.

    An owner of unknown state counts until it has sent no heartbeat for ``LEASE_SECONDS``.
    """
    owners = folder / "owners"
    if not owners.is_dir():
        return None
    path = owners / f"{_newest_generation(owners)}.json"
    found = _read_owner(path)
    return _describe_owner(found) if found and _is_alive(found, path, queue) is not False else None


def lease_generation(folder: Path) -> int:
    """Return the generation of the newest lease on ``folder``; 0 if there has been none."""
    owners = folder / "owners"
    return _newest_generation(owners) if owners.is_dir() else 0


def _is_alive(owner: dict[str, Any], path: Path, queue: JobQueue) -> bool | None:
    """Return whether the owner may still write, or None if neither host, queue nor heartbeat decides it."""
    this = describe_process(os.getpid(), queue)
    same = {key for key in this if owner.get(key) == this[key] and this[key] is not None}
    if {"cluster", "job"} <= same and owner["restarts"] < this["restarts"]:
        return False  # a previous attempt of this job, which ended before this attempt started
    if {"host", "space"} <= same and owner["started"] is not None:
        return process_start_time(owner["pid"]) == owner["started"]
    silence = _file_system_time(path.parent) - _last_heartbeat(path)
    # a cluster may hide the jobs of other users, which looks as if they had ended
    ended = {"cluster", "user"} <= same and owner["job"] and queue.has_ended(owner["job"])
    if silence > LEASE_SECONDS or ended:
        return False
    return None


def _wait_whether_alive(owner: dict[str, Any], path: Path, queue: JobQueue) -> bool:
    """Return whether the owner may still write. If nothing else decides it, wait for a heartbeat."""
    began, first = time.monotonic(), _last_heartbeat(path)
    silence = _file_system_time(path.parent) - first
    if (alive := _is_alive(owner, path, queue)) is not None:
        return alive
    announced = False
    while (waited := time.monotonic() - began) + silence <= LEASE_SECONDS:
        if _last_heartbeat(path) != first:
            return bool(_read_owner(path))  # the file is empty if the owner has just released the lease
        if not announced and waited > 2 * HEARTBEAT_SECONDS:
            announced = True
            left = LEASE_SECONDS - silence - waited
            logger.warning(
                "%s belongs to %s, which has sent no heartbeat; taking over in %.0f s",
                path.parent.parent,
                _describe_owner(owner),
                left,
            )
        time.sleep(min(0.2, HEARTBEAT_SECONDS / 4))
    return False


def _last_heartbeat(path: Path) -> float:
    """Return the modification time. The file is opened, so that a network file system refreshes its cache."""
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime


def _file_system_time(folder: Path) -> float:
    """Return the current time of the file system of ``folder``, which may have the clock of another machine.

    If the folder is not writable, this is the time of this machine.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.utime(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    except PermissionError:
        return time.time()
