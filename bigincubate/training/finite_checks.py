"""Check that training did not diverge."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import NonFiniteError


def check_skipped_steps(title: str, skipped: int, step: int, since: int, allowed: int) -> None:
    """Check the number of steps that were skipped because their gradient was not finite.

    Args:
        title: Title of the phase, for the message.
        skipped: Number of skipped steps.
        step: Number of completed steps.
        since: Step of the checkpoint that the phase was rolled back to; 0 if it was not.
        allowed: Maximum number of skipped steps.

    Raises:
        NonFiniteError: More steps were skipped.
    """
    if skipped > allowed:
        after = f" since the rollback to step {since}" if since else ""
        raise NonFiniteError(
            f"{title}: the gradient was not finite in {skipped} of {step - since} steps{after}"
            f" (train.max_nonfinite = {allowed}); lower train.lr, or check the data"
        )


def check_training(title: str, last: Mapping[str, float], skipped: int, steps: int) -> None:
    """Check the end of a phase. The loss of its last step may be non-finite only if that step was skipped.

    Args:
        title: Title of the phase, for the message.
        last: Metrics of the last step.
        skipped: Number of skipped steps.
        steps: Number of steps among which they are counted.

    Raises:
        NonFiniteError: All steps were skipped, or the loss is not finite although its gradient is.
    """
    loss, norm = last.get("train/loss", 0.0), last.get("train/grad_norm", 0.0)
    if 0 < steps <= skipped:
        reason = f"the gradient was finite in none of {steps} steps"
    elif math.isfinite(norm) and not math.isfinite(loss):
        reason = f"the last training loss is {loss}, although its gradient is finite"
    else:
        return
    raise NonFiniteError(f"{title}: {reason}; lower train.lr, or check the data and the loss")
