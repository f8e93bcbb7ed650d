"""A rank that stands still is found by the others, and none waits for it.

A thread of each rank counts in the ranks' own store, and looks at the count of the next rank, which looks at the one
after it. Where a count stands still while the store answers, that rank is stopped, frozen, or gone with its machine;
who sees it tells all others through the store, and all leave together. The thread counts, not the training: a step, a
compilation or an evaluation may take as long as it likes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from ..errors import Exit
from .env import RunEnv, stderr

POLL = 2.0  # seconds between two looks
PATIENCE = 9  # looks, one after the other, at which nothing has moved
LEFT = 1 << 40  # added to its count by a rank that leaves


@contextmanager
def watched(env: RunEnv, name: str, who: dict[str, Any], record: Callable[[str], None]) -> Iterator[None]:
    """The ranks watch each other while the block runs. Where one stands still, every other one says so on stderr, and
    ends with :attr:`Exit.ENVIRONMENT` wherever it is: what it would wait for never comes.

    Args:
        name: not used before in this store, and the same on all ranks.
        who: ``host`` and ``pid`` of this rank.
        record: called with the reason by one rank that lives.
    """
    if env.world == 1:
        yield
        return
    watch = Watch(env, name, env.gather(who), record)
    try:
        yield
    finally:
        watch.stop()


class Watch:
    """One rank's part of it."""

    def __init__(self, env: RunEnv, name: str, who: list[dict[str, Any]], record: Callable[[str], None]) -> None:
        from torch.distributed import TCPStore

        self.env, self.name, self.who, self.record = env, name, who, record
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a connection of its own: that of the process group may be busy for long
        self.store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=5))
        self.looks = 0
        self.over, self.leaving = threading.Event(), threading.Event()
        # a store that a launcher hosts may be suspended with it, which is nobody's death
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        tasks = [self._count, *([self._watch_host] if hosted and not env.is_main else [])]
        self.threads = [threading.Thread(target=task, daemon=True) for task in tasks]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Before this rank leaves; if all are leaving because of one, this does not return."""
        if self.leaving.is_set():
            threading.Event().wait()
        self.over.set()
        for thread in self.threads:
            thread.join(2 * POLL)  # a store that does not answer is not waited for

    def _count(self) -> None:
        rank = self.env.rank
        peer = (rank + 1) % self.env.world
        own, other, reason = f"{self.name}/{rank}", f"{self.name}/{peer}", f"{self.name}/reason"
        seen, still = -1, 0
        try:
            while not self.over.wait(POLL):
                self.store.add(own, 1)
                if self.store.check([reason]):
                    self._leave(self.store.get(reason).decode())
                count = self.store.add(other, 0)
                still = 0 if count != seen or count >= LEFT else still + 1
                seen = count
                self.looks += 1
                if still >= PATIENCE:
                    text = self._says(peer)
                    self.store.set(reason, text)
                    self.record(text)
                    self._leave(text)
            self.store.add(own, LEFT)
        except RuntimeError:
            return  # the store is gone, and with it a rank or the launcher; the training notices by itself

    def _watch_host(self) -> None:
        """Rank 0 hosts the store: where it stands still, so does every call."""
        seen, still = -1, 0
        while not self.over.wait(POLL) and self.threads[0].is_alive():
            still = still + 1 if self.looks == seen else 0
            seen = self.looks
            if still >= PATIENCE:
                text = self._says(0)
                if self.env.rank == 1:
                    self.record(text)
                self._leave(text)

    def _says(self, rank: int) -> str:
        who = self.who[rank]
        return (
            f"rank {rank} (process {who['pid']} on {who['host']}) gave no sign of life for {PATIENCE * POLL:.0f} s;"
            " all ranks leave, the same command goes on from the last checkpoint"
        )

    def _leave(self, text: str) -> NoReturn:
        self.leaving.set()
        stderr(f"bigincubate: {text}")
        time.sleep(1.5 * POLL)  # until all have heard it: who leaves first breaks the connections of the others
        os._exit(Exit.ENVIRONMENT)
