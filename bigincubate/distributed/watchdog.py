"""Detect a rank that does not respond, and end all ranks instead of waiting forever.

A thread of each rank increments a counter in the ranks' shared store and reads the counter of the next rank. If that
counter does not change although the store responds, the next rank is stopped, frozen, or lost with its machine. The
rank that detects this reports it through the store, and all ranks exit together. The thread is independent of the
training thread: a step, a compilation or an evaluation may take any time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import RankTimeoutError
from .flight_recorder import FlightRecorder, is_timeout
from .process_group import DistributedContext, print_stderr
from .stragglers import StragglerWatch

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 2.0  # seconds between reads of a counter
MAX_UNCHANGED_POLLS = 9  # consecutive reads without a change after which a rank has timed out
LEFT = 1 << 40  # a rank adds this to its counter when it leaves


@contextmanager
def watch_ranks(
    env: DistributedContext,
    name: str,
    process: dict[str, Any],
    record: Callable[[str], None],
    dumps: Path,
    straggler_share: float = 0.0,
) -> Iterator[StragglerWatch | None]:
    """Let the ranks watch each other while the block runs.

    If a rank does not respond, every other rank prints the reason to stderr, dumps its flight recorder, and exits with
    the exit code of :class:`RankTimeoutError`, because pending collectives would never complete. The recorder is also
    dumped if a collective in the block exceeds its limit.

    Args:
        env: The ranks.
        name: A key that is the same on all ranks and was not used before in this store.
        process: ``host`` and ``pid`` of this rank.
        record: Called with the reason on one of the other ranks.
        dumps: Folder for the dumps of the flight recorders.
        straggler_share: See :class:`StragglerDetector`; 0: ranks are not compared.

    Yields:
        The object with which ranks publish their work, to be compared; None if they are not compared.
    """
    if env.world == 1:
        yield None
        return
    processes = env.gather(process)
    stragglers = None
    if straggler_share:
        stragglers = StragglerWatch(env.rank, straggler_share, [each["host"] for each in processes])
    recorder = FlightRecorder(dumps, env.rank, ("gloo", "nccl") if env.device.type == "cuda" else ("gloo",))
    watch = RankWatchdog.start(env, name, processes, record, recorder, stragglers)
    try:
        with recorder.dumped_by_nccl():
            yield stragglers
    except RuntimeError as error:
        if is_timeout(error):
            recorder.dump()
        raise
    finally:
        watch.stop()


class RankWatchdog:
    """The watchdog threads of one rank.

    Args:
        env: The ranks.
        name: Prefix of the keys in the store.
        processes: ``host`` and ``pid`` of every rank.
        record: See :func:`watch_ranks`.
        recorder: Flight recorder of this rank.
        stragglers: Exchanges and compares the work of the ranks; None if they are not compared.
        store: The ranks' shared store.
        watch_host: Whether to also watch rank 0, which hosts the store.
    """

    def __init__(
        self,
        env: DistributedContext,
        name: str,
        processes: list[dict[str, Any]],
        record: Callable[[str], None],
        recorder: FlightRecorder,
        stragglers: StragglerWatch | None,
        store: Store,
        *,
        watch_host: bool,
    ) -> None:
        self.env, self.name, self.processes, self.record = env, name, processes, record
        self.recorder, self.stragglers, self.store = recorder, stragglers, store
        self.polls = 0
        self.stopped, self.exiting = threading.Event(), threading.Event()
        tasks = [self._count, *([self._watch_host] if watch_host else [])]
        self.threads = [threading.Thread(target=task, daemon=True) for task in tasks]

    @classmethod
    def start(
        cls,
        env: DistributedContext,
        name: str,
        processes: list[dict[str, Any]],
        record: Callable[[str], None],
        recorder: FlightRecorder,
        stragglers: StragglerWatch | None,
    ) -> RankWatchdog:
        """Connect to the store and start watching. Arguments are those of the constructor."""
        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a separate connection, because that of the process group may be busy for a long time
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=5))
        # a store in the launcher's process may be suspended with the launcher while all ranks are alive
        hosted_by_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        watch = cls(
            env, name, processes, record, recorder, stragglers, store, watch_host=hosted_by_rank_0 and not env.is_main
        )
        for thread in watch.threads:
            thread.start()
        return watch

    def stop(self) -> None:
        """Stop watching before this rank leaves. If a rank has timed out, block until this process exits."""
        if self.exiting.is_set():
            threading.Event().wait()
        self.stopped.set()
        for thread in self.threads:
            thread.join(2 * POLL_SECONDS)  # do not wait for a store that does not answer

    def _count(self) -> None:
        rank = self.env.rank
        peer = (rank + 1) % self.env.world
        own, other, reason = f"{self.name}/{rank}", f"{self.name}/{peer}", f"{self.name}/reason"
        last_count, unchanged = -1, 0
        try:
            while not self.stopped.wait(POLL_SECONDS):
                self.store.add(own, 1)
                if self.store.check([reason]):
                    self._exit(self.store.get(reason).decode())
                count = self.store.add(other, 0)
                unchanged = 0 if count != last_count or count >= LEFT else unchanged + 1
                last_count = count
                if self.stragglers is not None:
                    self.stragglers.exchange(self.store, self.name)
                self.polls += 1
                if unchanged >= MAX_UNCHANGED_POLLS:
                    text = self._describe(peer)
                    self.store.set(reason, text)
                    self.record(text)
                    self._exit(text)
            self.store.add(own, LEFT)
        except RuntimeError:
            return  # the store is gone, and with it a rank or the launcher; training will fail with its own error

    def _watch_host(self) -> None:
        """Detect that rank 0, which hosts the store, does not respond: every call to the store then blocks."""
        last_polls, unchanged = -1, 0
        while not self.stopped.wait(POLL_SECONDS) and self.threads[0].is_alive():
            unchanged = unchanged + 1 if self.polls == last_polls else 0
            last_polls = self.polls
            if unchanged >= MAX_UNCHANGED_POLLS:
                text = self._describe(0)
                if self.env.rank == 1:
                    self.record(text)
                self._exit(text)

    def _describe(self, rank: int) -> str:
        process, seconds = self.processes[rank], MAX_UNCHANGED_POLLS * POLL_SECONDS
        return (
            f"rank {rank} (process {process['pid']} on {process['host']}) did not respond for {seconds:.0f} s;"
            " all ranks exit; run the same command again to resume from the last checkpoint"
        )

    def _exit(self, text: str) -> NoReturn:
        self.exiting.set()
        print_stderr(f"bigincubate: {text}")
        since = time.monotonic()
        self.recorder.dump()
        # until all ranks have read the reason, because an exit breaks connections
        time.sleep(max(0.0, since + 1.5 * POLL_SECONDS - time.monotonic()))
        os._exit(RankTimeoutError.code)
