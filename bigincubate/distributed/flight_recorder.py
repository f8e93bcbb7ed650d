"""Write torch's flight recorder, which has the last collectives of a rank, to the phase's folder when a rank hangs.

torch records each collective of a rank's process groups (kind, sizes, Python stack, state) in a ring buffer. The dumps
of all ranks together show which rank did not take part in which collective.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..compat.torch import read_flight_recorder

ENTRIES = 2000  # collectives in the ring buffer; torch's default since 2.7, but not in every build
DUMP_SECONDS = 6.0  # limit of a dump
SIZE_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # current name, and former name
DUMP_VARIABLES = ("TORCH_FR_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT")
FILE_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def enable_flight_recorder() -> None:
    """Turn on the recorder, and NCCL's own dump after a timeout. Must be called before a process group is created.

    Environment variables that the user has set, under their current or former names, are kept.
    """
    if not any(name in os.environ for name in SIZE_VARIABLES):
        os.environ[SIZE_VARIABLES[0]] = str(ENTRIES)
    if not any(name in os.environ for name in DUMP_VARIABLES):
        os.environ[DUMP_VARIABLES[1]] = "1"  # read by all versions


class FlightRecorder:
    """Dumps the recorder of one rank, at most once.

    Args:
        folder: Folder for the dumps, which are named ``BACKEND_RANK``. It is created when it is needed.
        rank: This rank.
        backends: The backends of its process groups: ``gloo``, and on a GPU ``nccl``.
    """

    def __init__(self, folder: Path, rank: int, backends: tuple[str, ...]) -> None:
        self.folder, self.rank, self.backends = folder, rank, backends
        self.started = threading.Lock()

    @contextmanager
    def dumped_by_nccl(self) -> Iterator[None]:
        """Let NCCL write its own dump after a timeout to the same file while the block runs.

        NCCL's threads detect a collective that takes longer than the limit, and end the process.
        """
        if "nccl" not in self.backends or any(name in os.environ for name in FILE_VARIABLES):
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ[FILE_VARIABLES[0]] = str(self.folder / "nccl_")  # read at the time of the dump
        try:
            yield
        finally:
            os.environ.pop(FILE_VARIABLES[0], None)
            for empty in (self.folder, self.folder.parent):
                with suppress(OSError):  # it contains dumps, or another rank has removed it
                    empty.rmdir()

    def dump(self) -> None:
        """Write the dumps, and wait for them for at most `DUMP_SECONDS`. Later calls do nothing."""
        if self.started.acquire(blocking=False):
            # in a thread, because the disk or the recorder may not respond
            thread = threading.Thread(target=self._write, daemon=True)
            thread.start()
            thread.join(DUMP_SECONDS)

    def _write(self) -> None:
        # first without stacks, because collecting these may take longer than the limit
        with suppress(OSError, RuntimeError, AttributeError):  # the process ends with a more important error
            self.folder.mkdir(parents=True, exist_ok=True)
            for stacks in (False, True):
                for backend in self.backends:
                    if content := read_flight_recorder(backend, stacks=stacks):
                        file = self.folder / f"{backend}_{self.rank}"
                        unfinished = self.folder / f".{file.name}"
                        unfinished.write_bytes(content)
                        unfinished.replace(file)


def is_timeout(error: RuntimeError) -> bool:
    """Return whether an error of torch says that a collective took longer than its limit."""
    return any(words in str(error).lower() for words in ("timed out", "timeout"))
