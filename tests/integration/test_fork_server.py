"""Phases that are forked from a process that has imported everything: like new processes, and independent of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from bigincubate.distributed.parent_death import adopt_orphans
from bigincubate.launchers.fork_server import COMMAND, ForkServer, ForkServers, can_fork
from bigincubate.launchers.rank_group import RankProcess, start_process
from bigincubate.tasks.names import TASKS, modules_to_preload

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork servers need Linux")
Harnesses = Callable[..., Any]
VARIABLES = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

# prints the state of a process that has just been started, as one line of JSON
DESCRIBE = """
import json, os, signal, sys, threading, torch
names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE")
files = {name: f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")}
print(json.dumps({
    "handlers": {name: str(signal.getsignal(getattr(signal, name))).split(" at ")[0] for name in names},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": threading.active_count(),
    "torch threads": torch.get_num_threads(),
    "cuda": torch.cuda.is_initialized(),
    "session": os.getsid(0) == os.getpgid(0) == os.getpid(),
    "files": {name: os.readlink(file) for name, file in files.items() if os.path.lexists(file)},
    "main": sys.modules["__main__"].__file__,
    "program": sys.argv,
    "path": sys.path,
    "environment": dict(os.environ),
    "parent": os.getppid(),
    "folder": os.getcwd(),
    "buffered": sys.stdout.line_buffering,
}))
"""
COUNT_FROZEN = """
import ctypes, gc
handler = ctypes.CFUNCTYPE(None)(lambda: print("frozen objects:", gc.get_freeze_count(), flush=True))
ctypes.CDLL(None).__cxa_atexit(handler, None, None)
"""
THREAD = """
import sys, threading, time
if "fork_server" in " ".join(sys.orig_argv):
    threading.Thread(target=time.sleep, args=(300,), daemon=True).start()
"""


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which a command describes its process if its recipe names the module ``described``."""
    folder = tmp_path_factory.mktemp("plugin")
    folder.joinpath("described.py").write_text(DESCRIBE)
    return {**VARIABLES, "PYTHONPATH": f"{folder}:{Path.cwd()}"}


DESCRIBED = [*COMMAND, "plan", "digits", "--set", 'model.library="described:nothing"']


@pytest.fixture(scope="module", autouse=True)
def adopting() -> Iterator[None]:
    with adopt_orphans():
        yield


@pytest.fixture(scope="module")
def server(described: dict[str, str]) -> Iterator[ForkServer]:
    server = ForkServer.start(described)
    yield server
    server.kill()


def wait_for(happened: Callable[[], Any], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def ended(process: RankProcess) -> int:
    wait_for(lambda: process.poll() is not None)
    code = process.poll()
    assert code is not None
    return code


def program_of(process: RankProcess) -> str:
    wait_for(lambda: process.poll() is not None or process.pid)
    return Path(f"/proc/{process.pid}/cmdline").read_text()


# ------------------------------------------------------------------------------------------------ one process


def test_forked_process_is_like_a_new_one(server: ForkServer, described: dict[str, str], tmp_path: Path) -> None:
    own = {**described, "RANK": "0", "OF_THIS_PHASE": "a b=c\n"}
    log = tmp_path / "log"
    found = {}
    for name, start in (("new", start_process), ("forked", server.start_process)):
        assert ended(start(DESCRIBED, own, log)) == 2  # the module has no function of that name
        first, last = log.read_text().splitlines()
        assert last.startswith("bigincubate: model.library")
        found[name] = json.loads(first)
        log.unlink()
    assert found["forked"] == found["new"]
    assert found["new"]["environment"].items() >= own.items()
    assert found["new"]["parent"] == os.getpid()
    assert set(found["new"]["files"]) == {"0", "1", "2"}


def test_forked_process_ends_without_visiting_the_objects_of_the_server(
    server: ForkServer, described: dict[str, str], tmp_path: Path
) -> None:
    """Visiting them would copy their memory. Exit handlers of C run only if a library was added to the process."""
    folder, log = Path(described["PYTHONPATH"].split(":")[0]), tmp_path / "log"
    folder.joinpath("count_frozen.py").write_text(COUNT_FROZEN)
    command = [*COMMAND, "plan", "digits", "--set", 'model.library="count_frozen:nothing"']
    assert ended(server.start_process(command, described, log)) == 2  # the module has no function of that name
    assert "frozen objects:" not in log.read_text()
    added = {**described, "HSA_TOOLS_LIB": "libtool.so"}
    assert ended(server.start_process(command, added, log)) == 2
    assert int(log.read_text().split("frozen objects:")[1]) > 100_000


@pytest.mark.parametrize("task", TASKS)
def test_server_forks_after_it_has_imported_what_a_task_needs(
    task: str, described: dict[str, str], tmp_path: Path
) -> None:
    server = ForkServer.start(described, modules_to_preload(task))
    try:
        process = server.start_process(DESCRIBED, described, tmp_path / "log")
        assert "fork_server_process" in program_of(process)
        assert ended(process) == 2
    finally:
        server.kill()


def test_output_is_appended_to_the_log(server: ForkServer, described: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of an earlier attempt\n")
    assert ended(server.start_process([*COMMAND, "--version"], described, log)) == 0
    assert log.read_text().startswith("of an earlier attempt\nbigincubate ")


def test_signal_that_ends_a_forked_process_is_its_exit_code(
    server: ForkServer,
    described: dict[str, str],
    harness: Harnesses,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    long = harness("train.max_steps=100000", "log.every_steps=1")
    process = server.start_process([*COMMAND, *map(str, long.command("pretrain"))], described, tmp_path / "log")
    request.addfinalizer(lambda: process.send_signal(signal.SIGKILL))
    wait_for(lambda: process.poll() is not None or long.log("pretrain"))
    assert process.pid == long.run.phase("pretrain").read_attempts()[0]["pid"]
    process.send_signal(signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    process.send_signal(signal.SIGTERM)  # nothing happens
    assert process.poll() == -signal.SIGKILL


def test_process_that_another_part_of_the_program_has_waited_for_has_ended(
    server: ForkServer, described: dict[str, str], tmp_path: Path
) -> None:
    """Such as a handler of SIGCHLD that waits for all children."""
    process = server.start_process([*COMMAND, "--version"], described, tmp_path / "log")
    wait_for(lambda: process.poll() is not None or process.pid)
    assert process.pid is not None
    os.waitpid(process.pid, 0)
    process.send_signal(signal.SIGTERM)  # nothing happens
    assert process.poll() == 0


def test_log_that_cannot_be_opened_leaves_no_open_file(
    server: ForkServer, described: dict[str, str], tmp_path: Path
) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        server.start_process([*COMMAND, "--version"], described, tmp_path / "missing" / "log")
    assert os.listdir("/proc/self/fd") == before


def test_workers_of_a_killed_phase_are_no_zombies(
    server: ForkServer,
    described: dict[str, str],
    harness: Harnesses,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    long = harness("train.max_steps=100000", "log.every_steps=1", "data.workers=2")
    process = server.start_process([*COMMAND, *map(str, long.command("pretrain"))], described, tmp_path / "log")
    request.addfinalizer(lambda: process.send_signal(signal.SIGKILL))
    wait_for(lambda: process.poll() is not None or long.log("pretrain"))
    pid = process.pid
    assert pid is not None
    assert len(members(pid)) >= 3
    process.send_signal(signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL

    def reaped() -> bool:
        server.reap_orphans()
        return not members(pid)

    wait_for(reaped)


def members(group: int) -> list[int]:
    """The processes of a process group, also those that have ended."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    found.append(int(process.name))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_forked_phase_computes_the_same_bits(
    workers: int, server: ForkServer, described: dict[str, str], harness: Harnesses, tmp_path: Path
) -> None:
    sets = ["train.max_steps=6", "log.every_steps=1", "drop_path.rate=0.3", f"data.workers={workers}"]
    runs = {"new": harness(*sets), "forked": harness(*sets)}
    starts = {"new": start_process, "forked": server.start_process}
    for name, run in runs.items():
        for phase, module in (("pretrain", None), ("incubate", 1)):
            command = [*COMMAND, *map(str, run.command(phase, module))]
            log = tmp_path / f"{name}-{phase}"
            assert ended(starts[name](command, described, log)) == 0, log.read_text()
    for phase, module in (("pretrain", None), ("incubate", 1)):
        losses = {name: [row["train/loss"] for row in run.log(phase, module)] for name, run in runs.items()}
        assert losses["forked"] == losses["new"]
        new, forked = (runs[name].weights(phase, module) for name in ("new", "forked"))
        assert all(torch.equal(tensor, forked[name]) for name, tensor in new.items())


# ------------------------------------------------------------------------------------------------ the server


def test_server_runs_no_operator_and_has_one_thread() -> None:
    """OpenBLAS gets two threads, which it starts when NumPy is imported."""
    code = """
import importlib, os, torch
from torch.utils._python_dispatch import TorchDispatchMode
from bigincubate.launchers import fork_server_process as server
called = set()
class Record(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        called.add(str(function))
        return function(*args, **(kwargs or {}))
with Record():
    for module in server.MODULES:
        importlib.import_module(module)
assert called == {"torchvision._cuda_version.default"}, called  # returns a number
server.stop_threads()
assert server.is_safe_to_fork()
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
assert not server.is_safe_to_fork()
"""
    environment = {**VARIABLES, "OMP_NUM_THREADS": "2"}
    checked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_server_with_a_second_thread_forks_nothing(described: dict[str, str], tmp_path: Path) -> None:
    tmp_path.joinpath("sitecustomize.py").write_text(THREAD)
    variables = {**described, "PYTHONPATH": f"{tmp_path}:{described['PYTHONPATH']}"}
    server = ForkServer.start(variables)
    process = server.start_process([*COMMAND, "--version"], variables, tmp_path / "log")
    assert "fork_server" not in program_of(process)
    assert ended(process) == 0
    assert tmp_path.joinpath("log").read_text().startswith("bigincubate ")
    server.kill()


def test_process_starts_as_a_new_one_if_the_server_ends_early(described: dict[str, str], tmp_path: Path) -> None:
    server = ForkServer.start(described)
    asked_before = server.start_process([*COMMAND, "--version"], described, tmp_path / "before")
    server.process.kill()
    server.process.wait()
    asked_after = server.start_process([*COMMAND, "--version"], described, tmp_path / "after")
    for process in (asked_after, asked_before):  # before either can have ended
        assert "fork_server" not in program_of(process)
    assert ended(asked_before) == ended(asked_after) == 0
    server.kill()


def test_process_survives_the_server(described: dict[str, str], harness: Harnesses, tmp_path: Path) -> None:
    long = harness("train.max_steps=300", "log.every_steps=1")
    own = ForkServer.start(described)
    process = own.start_process([*COMMAND, *map(str, long.command("pretrain"))], described, tmp_path / "log")
    wait_for(lambda: long.log("pretrain"))
    assert "fork_server" in program_of(process)
    own.kill()
    assert ended(process) == 0
    assert long.run.phase("pretrain").result is not None


def test_process_that_is_stopped_before_it_exists_never_runs(described: dict[str, str], tmp_path: Path) -> None:
    server = ForkServer.start(described)
    process = server.start_process([*COMMAND, "--version"], described, tmp_path / "log")
    assert process.pid is None
    process.send_signal(signal.SIGTERM)
    server.kill()
    assert ended(process) == -signal.SIGTERM
    assert tmp_path.joinpath("log").read_text() == ""


def test_process_that_is_killed_before_it_exists_never_runs(described: dict[str, str], tmp_path: Path) -> None:
    """Even if the server serves the request; such as rank 0 when rank 1 could not be started."""
    server = ForkServer.start(described)
    killed = server.start_process([*COMMAND, "--version"], described, tmp_path / "killed")
    killed.send_signal(signal.SIGKILL)
    assert killed.poll() == -signal.SIGKILL
    later = server.start_process([*COMMAND, "--version"], described, tmp_path / "later")
    assert ended(later) == 0
    assert tmp_path.joinpath("killed").read_text() == ""
    server.kill()


def test_server_ends_with_a_killed_launcher(described: dict[str, str]) -> None:
    """Also if a child of the launcher, such as a worker that prepares data, still has the connection open."""
    code = """
import os, signal, time
from bigincubate.launchers.fork_server import ForkServer
server = ForkServer.start(dict(os.environ))
child = os.fork()
if child == 0:
    time.sleep(300)
print(server.process.pid, child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", code], env=described, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        server, child = map(int, launcher.stdout.readline().split())
        try:
            assert launcher.wait(60) == -signal.SIGKILL
            wait_for(lambda: os.waitpid(server, os.WNOHANG)[0])  # this process has adopted it
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_each_environment_has_its_own_server(described: dict[str, str]) -> None:
    servers = ForkServers()
    one = servers.find(described)
    assert servers.find(dict(described)) is one
    assert servers.find({**described, "OMP_NUM_THREADS": "2"}) is not one
    servers.kill()
    assert one.process.returncode is not None


def test_several_ranks_with_gpus_are_not_forked() -> None:
    assert can_fork(1, ["0"])
    assert can_fork(2, [])
    assert not can_fork(2, ["0", "1"])
