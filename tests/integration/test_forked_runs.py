"""Runs whose phases are forked: one interpreter imports, and no process is left behind however a run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import Command
from rich.console import Console
from test_fork_server import VARIABLES, wait_for

from bigincubate.launchers.fork_server import COMMAND, ForkServer
from bigincubate.launchers.local import LocalRunner
from bigincubate.launchers.progress import ProgressReporter
from bigincubate.storage.lease import process_start_time
from bigincubate.storage.run_directory import RunDir

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork servers need Linux")
Harnesses = Callable[..., Any]
STARTED = """
import os, sys
if "bigincubate" in " ".join(sys.orig_argv):
    with open(os.environ["INTERPRETERS"], "a") as file:
        file.write(f"{os.getpid()} {' '.join(sys.orig_argv[1:4])}\\n")
"""
HELD = """
import time
while "fork_server" in " ".join(sys.orig_argv) and os.path.exists(os.environ["HOLD"]):
    time.sleep(0.01)
"""


@pytest.fixture
def interpreters(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A file to which each interpreter that runs bigincubate adds a line, and the variables that make it do so."""
    tmp_path.joinpath("sitecustomize.py").write_text(STARTED)
    file = tmp_path / "interpreters"
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    return file, {"PYTHONPATH": path, "INTERPRETERS": str(file), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("nproc", [1, 2])
def test_run_starts_one_interpreter(nproc: int, harness: Harnesses, interpreters: tuple[Path, dict[str, str]]) -> None:
    started, variables = interpreters
    short = harness("train.max_steps=2")
    words = ["run", short.run.recipe_file, "--run-dir", short.run.path, "--jobs", 2, "--nproc", nproc]
    command = Command(*words, env=variables)
    assert command.wait(300) == 0, command.out
    (line,) = started.read_text().splitlines()
    assert " -m bigincubate.launchers.fork_server_process " in line
    pids = [short.run.phase(*key).read_attempts()[0]["pid"] for key in PHASES]
    assert len(set(pids)) == len(PHASES)


def test_first_server_starts_before_the_launcher_imports_large_libraries(fast: Path, tmp_path: Path) -> None:
    """Both import them at the same time; otherwise the run would wait for one after the other."""
    code = """
import sys
from bigincubate.cli import main
from bigincubate.launchers.fork_server import ForkServer
LARGE = {'torch', 'timm', 'numpy'}
ForkServer.start = lambda environment, modules: sys.exit(f"imported: {[*LARGE & sys.modules.keys()]}")
main()
"""
    words = ["run", fast, "--run-dir", tmp_path / "run"]
    ended = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert ended.stderr == "imported: []\n"


@pytest.mark.parametrize(("jobs", "baseline", "parallel"), [(1, True, 1), (2, False, 1), (2, True, 2), (8, True, 2)])
def test_first_server_has_the_threads_of_the_first_phase(
    jobs: int, baseline: bool, parallel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta model shares the cores with the baseline if both run at the same time."""
    asked: list[dict[str, str]] = []

    def refuse(environment: dict[str, str], modules: Sequence[str]) -> ForkServer:
        asked.append(environment)
        raise OSError

    monkeypatch.setattr(ForkServer, "start", refuse)
    runner = LocalRunner(RunDir(tmp_path), jobs, ProgressReporter(Console(quiet=True)), variables={})
    runner.start_server(baseline=baseline)
    assert [variables["OMP_NUM_THREADS"] for variables in asked] == [str(max(1, (os.cpu_count() or 1) // parallel))]


PHASES: list[tuple[Any, ...]] = [("pretrain",), ("incubate", 0), ("incubate", 1), ("finetune",)]


@pytest.mark.parametrize(("when", "code"), [("planning", 130), ("importing", 75)])
def test_run_that_is_stopped_early_leaves_no_process(
    when: str, code: int, harness: Harnesses, interpreters: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """While the launcher plans, and while it waits for the server's imports."""
    started, variables = interpreters
    hold = tmp_path / "hold"
    hold.touch()
    tmp_path.joinpath("sitecustomize.py").write_text(STARTED + HELD)
    variables["HOLD"] = str(hold)
    short = harness("train.max_steps=2")
    words = [*COMMAND, "run", str(short.run.recipe_file), "--run-dir", str(short.run.path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    command = subprocess.Popen(words, env={**VARIABLES, **variables}, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    output = command.stdout
    assert output is not None
    if when == "planning":
        wait_for(lambda: started.exists() and "fork_server_process" in started.read_text())
    else:
        wait_for(lambda: "started" in output.readline())
    command.send_signal(signal.SIGINT)
    assert command.wait(60) == code
    assert ("stopping:" in output.read()) == (when == "importing")
    assert not short.run.phase("pretrain").read_attempts()
    (server,) = [int(line.split()[0]) for line in started.read_text().splitlines() if "fork_server_process" in line]
    wait_for(lambda: process_start_time(server) is None and not processes_that_log_to(short.run.path))
    hold.unlink()
    last = Command("run", short.run.recipe_file, "--run-dir", short.run.path, env=variables)
    assert last.wait(300) == 0


def processes_that_log_to(run: Path) -> list[str]:
    """The pids of the processes whose output goes to a log of the run."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                output = os.readlink(process / "fd" / "1")
            except OSError:
                continue
            if output.startswith(str(run)):
                found.append(process.name)
    return found


def test_forked_phase_of_a_killed_launcher_saves_and_exits(harness: Harnesses) -> None:
    long = harness("train.max_steps=100000", "log.every_steps=1")
    command = Command("run", long.run.recipe_file, "--run-dir", long.run.path, env={"OMP_NUM_THREADS": "1"})
    wait_for(lambda: long.log("pretrain"))
    assert processes_that_log_to(long.run.path)
    command.kill()
    wait_for(lambda: not processes_that_log_to(long.run.path))
    (attempt,) = long.run.phase("pretrain").read_attempts()
    assert attempt["state"] == "preempted"


def test_orphans_are_adopted_only_during_a_run(harness: Harnesses) -> None:
    """Before and after ``bi.run``, a program does not adopt the orphans that its other children leave behind."""
    code = """
import os, subprocess, sys
import bigincubate as bi
def parent_of_orphan():
    child = subprocess.run(["sh", "-c", "sleep 1 >/dev/null & echo $!"], stdout=subprocess.PIPE, check=True)
    return int(open(f"/proc/{int(child.stdout)}/stat").read().rpartition(")")[2].split()[1])
before = parent_of_orphan()
bi.run(bi.load_recipe(sys.argv[1]), sys.argv[2], jobs=1)
assert before == parent_of_orphan() != os.getpid()
"""
    short = harness("train.max_steps=2")
    words = [sys.executable, "-c", code, str(short.run.recipe_file), str(short.run.path)]
    ended = subprocess.run(words, env=VARIABLES, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert short.run.phase("finetune").result is not None


# a C extension that is interrupted while it is imported
REPLACED = """
import os, signal, sys, time
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt:
                raise ImportError("numpy._core.multiarray failed to import") from None
sys.meta_path.insert(0, Interrupted())
"""


def test_interrupt_that_an_import_replaces_by_its_own_error_ends_the_command_as_any_other(
    harness: Harnesses, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(REPLACED)
    short = harness("train.max_steps=2")
    words = [*COMMAND, "run", str(short.run.recipe_file), "--run-dir", str(short.run.path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    variables = {**VARIABLES, "PYTHONPATH": f"{tmp_path}:{VARIABLES.get('PYTHONPATH', '')}"}
    ended = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    signal.signal(signal.SIGINT, before)
    assert ended.returncode == 130
    assert (
        ended.stderr
        == "bigincubate: interrupted; committed results and checkpoints are kept; run the same command again\n"
    )
