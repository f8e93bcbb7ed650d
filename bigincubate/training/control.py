"""Agreement of all ranks on whether to stop, without a collective operation in every step."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..distributed.process_group import DistributedContext

MAX_SECONDS = 1.0  # between two agreements, as predicted from the last steps; with longer steps, one step
MAX_STEPS = 50  # between two agreements


class ControlPoll:
    """Tells each rank whether a flag is set on any rank.

    The ranks agree on this about once a second instead of in every step, because each agreement is a collective
    operation on the CPU, which makes fast ranks wait for slow ones. Rank 0 chooses the number of steps until the next
    agreement from the measured time of a step, and all ranks use this number.

    Args:
        env: The ranks.
        clock: Returns the time in seconds.

    Attributes:
        next_step: Step of the next agreement.
    """

    def __init__(self, env: DistributedContext, clock: Callable[[], float] = time.monotonic) -> None:
        self.env, self.clock = env, clock
        self.restart()

    def restart(self) -> None:
        """Agree in the next call. Call this after something long that is not a step, such as an evaluation."""
        self.next_step = 0
        self._last: tuple[int, float] | None = None  # step and time of the last agreement

    def any_rank(self, step: int, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set on any rank; False for all between two agreements.

        Args:
            step: Number of optimizer steps so far, the same on all ranks.
            flags: The flags of this rank. A flag must stay set until a call returns True for it.
        """
        if self.env.world == 1:
            return flags
        if step < self.next_step:
            return (False,) * len(flags)
        interval = self._choose_interval(step) if self.env.is_main else 0
        *votes, interval = self.env.max_over_ranks([*map(int, flags), interval])
        self._last, self.next_step = (step, self.clock()), step + interval
        return tuple(map(bool, votes))

    def _choose_interval(self, step: int) -> int:
        """Return the number of steps until the next agreement."""
        if self._last is None:
            return 1
        last, since = self._last
        seconds_per_step = max(self.clock() - since, 1e-9) / (step - last)
        return max(1, min(MAX_STEPS, int(MAX_SECONDS / seconds_per_step)))
