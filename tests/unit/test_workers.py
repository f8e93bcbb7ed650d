"""No process waits forever for another one: a loader worker, the holder of a lock, a rank that never starts."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from bigincubate.config import AugmentConfig, DataConfig
from bigincubate.data import prepare, process_pool, workers
from bigincubate.data.dataset import open_dataset
from bigincubate.data.file_locks import file_lock
from bigincubate.data.streams import TrainStream
from bigincubate.data.workers import (
    check_shared_memory,
    describe_worker_failure,
    explain_worker_failures,
    limit_wait,
)
from bigincubate.distributed import process_group
from bigincubate.errors import RankTimeoutError, SystemResourceError
from bigincubate.tasks.image_classification.views import TrainTransform

FORK = multiprocessing.get_context("fork")
CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE = 0x00020000, 0x10000000, 0x4000, 0x40000
LIMIT = 30.0  # seconds after which a test counts as hanging; each needs a few


def batches(digits: Path, **replaced: Any) -> Any:
    transform: Any = TrainTransform(AugmentConfig(), 16, seed=0, classes=10)
    for name, value in replaced.items():
        setattr(transform, name, value)
    stream = TrainStream(open_dataset(digits), DataConfig(workers=2), transform, seed=0, batch_size=64)
    return closing(stream.batches(0))


@pytest.fixture
def worker_pids() -> Callable[[], list[int]]:
    """The processes of this test."""
    earlier = set(multiprocessing.active_children())
    return lambda: sorted(child.pid or 0 for child in set(multiprocessing.active_children()) - earlier)


def in_a_child(work: Callable[[], str]) -> str:
    """What ``work`` returns in a forked process; fails if it hangs."""
    reader, writer = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: writer.send(work()))
    child.start()
    writer.close()
    try:
        assert reader.poll(LIMIT), "the loader hangs"
        return str(reader.recv())
    finally:
        # a worker that is suspended would keep the output of the tests open
        if (children := Path(f"/proc/{child.pid}/task/{child.pid}/children")).exists():
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        child.kill()


def mount_small_shared_memory(kib: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={kib}k".encode()):
        raise OSError(ctypes.get_errno(), "mount")


@pytest.mark.parametrize(("kib", "says"), [(1100, "is too small: 2 loader workers hold up to 10"), (200, "is full")])
def test_small_shared_memory_is_an_error_and_not_a_hang(digits: Path, kib: int, says: str) -> None:
    def train() -> str:
        try:
            mount_small_shared_memory(kib)
        except OSError as error:
            return f"cannot mount: {error}"
        try:
            with batches(digits) as loaded:
                for _, _batch in zip(range(5), loaded, strict=False):
                    pass
        except SystemResourceError as error:
            return str(error)
        return "no error"

    found = in_a_child(train)
    if found.startswith("cannot mount"):
        pytest.skip(f"needs a small /dev/shm in a mount namespace, which is not permitted here: {found}")
    assert says in found
    assert "--shm-size" in found
    assert "data.workers" in found


@pytest.mark.parametrize(("needed", "free", "ranks", "fits"), [(8, 8, 1, True), (8, 7, 1, False), (8, 8, 9**9, False)])
def test_shared_memory_is_counted_over_loaders_and_ranks(
    needed: int, free: int, ranks: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers with two batches each and one in use; as many rows of an evaluation."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    mib = 2**20
    call = lambda: check_shared_memory(2, needed * mib // 8, rows=64, free=10 * free * mib // 8)  # noqa: E731
    if fits:
        call()
    else:
        with pytest.raises(SystemResourceError, match="too small"):
            call()


def test_batch_that_cannot_be_sent_is_an_error_and_not_a_hang(digits: Path) -> None:
    with pytest.raises(SystemResourceError, match=r"could not hand over a batch: .*pickle") as raised:  # noqa: SIM117
        with batches(digits, collate=lambda views: {"images": lambda: views}) as loaded:
            next(loaded)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGKILL, "illed.*more memory"),
        (signal.SIGBUS, "/dev/shm is full|killed or ended early"),
        (signal.SIGSTOP, "no batch from the loader workers"),
    ],
)
def test_worker_that_is_ended_or_suspended_is_named(
    digits: Path, number: signal.Signals, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, because torch raises its error there at any moment."""
    if number is signal.SIGSTOP:
        monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 0.5)

    def train() -> str:
        try:
            with explain_worker_failures(), batches(digits) as loaded:
                next(loaded)
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, number)
                for _ in range(100):
                    next(loaded)
        except SystemResourceError as error:
            return str(error)
        return "no error"

    found = in_a_child(train)
    assert re.search(says, found), found
    assert "\n" not in found


def test_worker_that_has_ended_is_not_reported_twice(digits: Path) -> None:
    """Its socket fails, and then the system says that the worker has ended."""

    def train() -> str:
        with batches(digits) as loaded:
            next(loaded)
            report = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)
                os.waitid(os.P_PID, child.pid or 0, os.WEXITED | os.WNOWAIT)
            signal.signal(signal.SIGCHLD, report)
            try:
                with limit_wait(list):
                    raise EOFError
            except SystemResourceError as error:
                os.kill(os.getpid(), signal.SIGCHLD)
                return str(error)

    assert re.search("killed or ended early", in_a_child(train))


def test_only_the_main_process_ends_workers(digits: Path, worker_pids: Callable[[], list[int]]) -> None:
    """Slurm sends SIGTERM to every process of a job step."""
    with batches(digits) as loaded:
        next(loaded)
        pids = worker_pids()
        slurm = FORK.Process(target=lambda: list(map(os.kill, pids, [signal.SIGTERM] * len(pids))))
        slurm.start()
        slurm.join()
        for _ in range(30):
            next(loaded)
        assert worker_pids() == pids
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        for child in multiprocessing.active_children():
            if child.pid in pids:
                child.join(LIMIT)
                assert child.exitcode == 0


def test_other_errors_are_not_explained() -> None:
    assert describe_worker_failure("CUDA error: out of memory") is None
    with pytest.raises(RuntimeError, match="mine"), explain_worker_failures():
        raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("DataLoader worker (pid(s) 1, 2) exited unexpectedly", "process 1, 2.*killed or ended early"),
        ("DataLoader worker (pid 3) is killed by signal: Segmentation fault. ", r"\(Segmentation fault\); run"),
        ("DataLoader worker (pid 3) is killed by signal: Bus error. It is possible that", "/dev/shm is full"),
        ("DataLoader worker (pid 3) exited unexpectedly with exit code 7. Details are lost", "exit code 7; the log"),
    ],
)
def test_texts_of_torch_become_one_line(text: str, says: str) -> None:
    assert re.search(says, describe_worker_failure(text) or "")


# ------------------------------------------------------------------------------------------------ other processes


def test_lock_of_a_process_that_never_releases_it_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with file_lock(file), pytest.raises(SystemResourceError, match=f"{file} was locked by another process for 0.05 s"):  # noqa: SIM117
        with file_lock(file, limit=0.05):
            pass
    with file_lock(file, limit=0):
        pass


def test_processes_that_prepare_nothing_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "CHUNK_SECONDS", 0.5)
    monkeypatch.setattr(prepare, "CHUNK_SAMPLES", 300)
    monkeypatch.setattr(prepare, "write_samples", _suspend)
    with pytest.raises(SystemResourceError, match=r"no process wrote any images for 0.5 s"):
        prepare.prepare_dataset("digits", tmp_path / "data", jobs=2)


def _suspend(_chunk: Any) -> int:
    os.kill(os.getpid(), signal.SIGSTOP)
    return 0


def test_ranks_that_never_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(process_group, "COLLECTIVE_LIMIT", timedelta(seconds=1))

    def join() -> str:
        try:
            process_group.DistributedContext.detect()
        except RankTimeoutError as error:
            return str(error)
        return "no error"

    assert re.search(rf"the 2 ranks did not all connect to 127.0.0.1:{port} \(.*\); check", in_a_child(join))


def test_signals_of_slurm_do_not_end_the_tracker_of_shared_memory() -> None:
    """In a new process, because the tracker starts only once."""
    code = (
        "import os, signal, time\n"
        "from multiprocessing import resource_tracker\n"
        "from bigincubate.data.shared_memory import claim_memory_prefix\n"
        "claim_memory_prefix()\n"
        "pid = resource_tracker._resource_tracker._pid\n"
        "for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):\n"
        "    os.kill(pid, number)\n"
        "time.sleep(0.2)\n"
        "print(os.waitpid(pid, os.WNOHANG), signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.stdout, ended.stderr) == ("(0, 0) set()\n", "")
