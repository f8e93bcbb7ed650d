"""Send the metrics of a phase to trackers while it trains (``log.trackers``), without affecting the training.

Each tracker is a separate process with low priority that replays ``metrics.jsonl``.

- A process and not a thread: the packages of trackers are large, hold the interpreter lock, start threads and
  processes, and may wait for a network for minutes. In a separate process, they cannot delay a step, and their errors
  and memory do not affect the trainer.
- The log and not a queue: the log already contains every step, so nothing is lost if a tracker is slow or fails, and
  there is no queue that can fill up. The next attempt, or ``bigincubate track``, sends the missing steps.

The trainer does not interact with the processes until the result is written. Then it waits for them, at most
``PATIENCE_S``, because a batch system ends all processes of a job with the trainer. After a failure or a stop signal,
it does not wait. A tracker that fails or is late causes one warning.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ...config import TrackerName
from ...errors import BigincubateError, Exit, format_command
from ...storage.run_directory import PhaseDir, RunDir
from .registry import PACKAGES, URI_VARIABLE, make_tracker
from .replay import Replay, follow

logger = logging.getLogger(__name__)

PATIENCE_S = 8.0  # maximum time that the trainer waits for trackers after its result
GRACE_S = 60.0  # maximum time of the last update after the end of the trainer
INTERVAL_S = 5.0  # time between updates


@contextmanager
def track_in_background(run: RunDir, folder: PhaseDir, key: str, names: Sequence[TrackerName]) -> Iterator[None]:
    """Send a phase to trackers while the ``with`` block runs. The trackers cause no errors in it, only warnings.

    Args:
        run: The run directory.
        folder: The phase's directory.
        key: Key of the phase.
        names: Names of the trackers.
    """
    started = [process for name in dict.fromkeys(names) if (process := _start(run, folder, key, name))]
    try:
        yield
    except BaseException:
        for process in started:
            process.stop()
        raise
    for process in started:
        process.stop()
    deadline = time.monotonic() + PATIENCE_S
    for process in started:
        process.wait(max(0.0, deadline - time.monotonic()))


class TrackerProcess:
    """The process of one tracker.

    Args:
        name: Name of the tracker.
        process: The process, which ends when its standard input is closed.
        log: File of its output.
        hint: Command that sends what is missing.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, hint: str) -> None:
        self.name, self.process, self.log, self.hint = name, process, log, hint
        self._given_up = False
        self._watcher = threading.Thread(target=self._report, name=f"tracker {name}", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Ask the process to end after one more update."""
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Wait for the process to end; kill it after this number of seconds."""
        self._watcher.join(seconds)
        if not self._watcher.is_alive():
            return
        self._given_up = True
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        _warn(self.name, f"not finished {PATIENCE_S:.0f} s after the phase", self.hint)

    def _report(self) -> None:
        code = self.process.wait()
        if code and not self._given_up:
            lines = [line for line in self._read_log() if line.strip()]
            reason = lines[-1].removeprefix("bigincubate: ") if lines else "no message"
            _warn(self.name, f"ended with code {code}: {reason}", self.hint)

    def _read_log(self) -> list[str]:
        try:
            return self.log.read_text(errors="replace").splitlines()
        except OSError:
            return []


def _warn(name: str, problem: str, hint: str) -> None:
    logger.warning("log.trackers: %s: %s; training is not affected; send what is missing with: %s", name, problem, hint)


def _start(run: RunDir, folder: PhaseDir, key: str, name: TrackerName) -> TrackerProcess | None:
    """Start the process of a tracker; if this is not possible, log a warning and return None."""
    hint = format_command("track", run.path, "--to", name)
    try:
        package = PACKAGES[name]
        # W&B creates a folder named wandb, which could be imported as a package without a file
        if package is not None and getattr(importlib.util.find_spec(package), "origin", None) is None:
            _warn(name, f"the package is not installed (pip install {package})", hint)
            return None
        if name == "mlflow" and not os.environ.get(URI_VARIABLE):
            # phases may run in parallel, and MLflow cannot repair a database whose creation was interrupted
            _warn(name, f"the variable {URI_VARIABLE} is not set; set it to the URI of a server", hint)
            return None
        log = folder.path / "logs" / f"tracker-{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    __name__,
                    str(run.path),
                    key,
                    name,
                    str(os.getpid()),
                ],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return TrackerProcess(name, process, log, hint)
    except Exception as error:
        _warn(name, str(error), hint)
        return None


# ------------------------------------------------------------------------------------------ in the process of a tracker


class _StopRequest:
    """Detects that the process should end: the trainer has closed the pipe or has ended, or sent SIGTERM.

    If the process has not ended after ``GRACE_S``, it is terminated.
    """

    def __init__(self, parent: int) -> None:
        self.parent, self.event = parent, threading.Event()
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for target in (self._await_pipe, self._await_parent):
            threading.Thread(target=target, daemon=True).start()

    def wait(self) -> bool:
        return self.event.wait(INTERVAL_S)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.event.set()

    def _await_pipe(self) -> None:
        while os.read(0, 1):
            pass
        self.event.set()

    def _await_parent(self) -> None:
        """Detect the end of the trainer even if a process that it forked keeps the pipe open."""
        while not self.event.wait(1) and os.getppid() == self.parent:
            pass
        self.event.set()
        time.sleep(GRACE_S)
        print(f"bigincubate: not finished {GRACE_S:.0f} s after the phase", file=sys.stderr, flush=True)
        os._exit(Exit.ENVIRONMENT)


def main(directory: str, key: str, name: TrackerName, parent: str) -> int:
    """Replay one phase until it is finished or the trainer ends, and return the exit code."""
    os.nice(19)
    run, request = RunDir(Path(directory)), _StopRequest(int(parent))
    try:
        # the tracker process of an earlier attempt, which was killed, may still be sending its last update
        with Replay(run, name, make_tracker(name, run), [key], patience=2 * GRACE_S) as replay:
            follow(replay, request.wait)
    except BigincubateError as error:
        print(f"bigincubate: {error}", file=sys.stderr, flush=True)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # type: ignore[arg-type]
