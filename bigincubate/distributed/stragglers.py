"""Find ranks that are slower than the others, from the time that each rank spends on its own work.

With synchronous training, the whole step takes equally long on all ranks, because each rank waits for the slowest one.
Therefore only two parts of a step are compared: the time that a rank waits for its data, and the time of its forward
passes. During these, a rank usually does not wait for others. The backward pass is left out, because gradients are
reduced in it. A slow disk or loader shows in the first part, a slow processor in the second.

Limits: FSDP2 and ZeRO-3 gather weights in the forward pass, where fast ranks wait for slow ones, so they hide a slow
processor, but not a slow loader. On a GPU the host works ahead of the device, so a wait for data counts even if the
device is busy during it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

INTERVAL = 10.0  # seconds between two comparisons
MIN_STEPS = 10  # steps of each rank between two comparisons
MIN_COST = 0.1  # share of the time of a whole step below which a difference does not matter
COMPARISONS = 3  # consecutive comparisons after which a rank is named as slow, or is no longer named


@dataclass(frozen=True)
class Work:
    """What a rank has done since it started.

    Attributes:
        steps: Number of optimizer steps.
        waited: Seconds spent waiting for data.
        computed: Seconds spent in forward passes; on a GPU, measured on the device.
    """

    steps: int = 0
    waited: float = 0.0
    computed: float = 0.0


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the median.

    Attributes:
        rank: The rank.
        host: The name of its machine.
        seconds: Seconds of its own work per step, in the comparison that last changed the slow ranks.
        waited: The part of ``seconds`` in which it waited for data.
        median: The median of ``seconds`` over all ranks.
    """

    rank: int
    host: str
    seconds: float
    waited: float
    median: float

    @property
    def ratio(self) -> float:
        """Return ``seconds`` divided by the median."""
        return self.seconds / self.median

    def __str__(self) -> str:
        """Return a description in one line."""
        return (
            f"rank {self.rank} ({self.host}) takes {self.ratio:.1f} times as long as the median: {self.seconds:.3f} s"
            f" per step before the backward pass, of which {self.waited:.3f} s waiting for data;"
            f" median {self.median:.3f} s"
        )


class StragglerDetector:
    """Compares the work of all ranks.

    Args:
        share: How much slower than the median a rank may be, as a share of the median.
        hosts: The name of each rank's machine.
        now: The current time in seconds.

    Attributes:
        named: The slow ranks, slowest first; replaced by a new tuple when a rank is added or removed.
        compared: Time of the last comparison.
        ratio: Time of the slowest rank divided by the median in the last comparison; None before the first one.
    """

    def __init__(self, share: float, hosts: Sequence[str], now: float) -> None:
        self.share, self.hosts, self.compared = share, hosts, now
        self.before = [Work()] * len(hosts)
        self.named: tuple[Straggler, ...] = ()
        self.ratio: float | None = None
        self.streaks = [0] * len(hosts)  # consecutive comparisons that contradict `named`

    def compare(self, works: Sequence[Work], now: float) -> None:
        """Compare the ranks, if each of them has done `MIN_STEPS` since the last comparison.

        For an even number of ranks, the median is the lower of the two middle values, so that a slow rank can be found
        even among two.

        Args:
            works: What each rank has done.
            now: The current time in seconds.
        """
        steps = [new.steps - old.steps for new, old in zip(works, self.before, strict=True)]
        if min(steps) < MIN_STEPS:
            return
        pairs = list(zip(works, self.before, steps, strict=True))
        waited = [(new.waited - old.waited) / count for new, old, count in pairs]
        computed = [(new.computed - old.computed) / count for new, old, count in pairs]
        seconds = [sum(parts) for parts in zip(waited, computed, strict=True)]
        cost = MIN_COST * (now - self.compared) / max(steps)
        self.before, self.compared = list(works), now
        median = statistics.median_low(seconds)
        if median <= 0:
            return
        self.ratio = max(seconds) / median
        limit = median + max(median * self.share, cost)
        named = {straggler.rank for straggler in self.named}
        for rank, own in enumerate(seconds):
            self.streaks[rank] = self.streaks[rank] + 1 if (own > limit) != (rank in named) else 0
        changed = {rank for rank, streak in enumerate(self.streaks) if streak >= COMPARISONS}
        if changed:
            for rank in changed:
                self.streaks[rank] = 0
            ranks = sorted(named ^ changed, key=lambda rank: -seconds[rank])
            self.named = tuple(Straggler(r, self.hosts[r], seconds[r], waited[r], median) for r in ranks)


class StragglerWatch:
    """Exchanges the work of the ranks through their store.

    Args:
        rank: This rank.
        share: See :class:`StragglerDetector`.
        hosts: The name of each rank's machine.

    Attributes:
        work: What this rank has done; replaced by the training thread after each step.
        detector: Compares the ranks; used only on rank 0.
    """

    def __init__(self, rank: int, share: float, hosts: Sequence[str]) -> None:
        self.rank, self.world = rank, len(hosts)
        self.work = Work()
        self.detector = StragglerDetector(share, hosts, time.monotonic())

    def exchange(self, store: Store, name: str) -> None:
        """Publish the work of this rank and, on rank 0, compare all ranks.

        The watchdog's thread calls this, so it must not wait for other ranks.

        Args:
            store: The store.
            name: Prefix of the keys in the store.
        """
        store.set(f"{name}/work/{self.rank}", json.dumps(astuple(self.work)))
        keys = [f"{name}/work/{rank}" for rank in range(self.world)]
        now = time.monotonic()
        if self.rank == 0 and now >= self.detector.compared + INTERVAL and store.check(keys):
            self.detector.compare([Work(*json.loads(value)) for value in store.multi_get(keys)], now)
