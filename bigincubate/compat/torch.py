"""Uses of undocumented behavior of torch's optimizers."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def skip_fused_step_if(optimizer: Optimizer, skip: Tensor) -> None:
    """Skip the next step of a fused optimizer if ``skip`` is true, without waiting for the device.

    A fused optimizer reads its attribute ``found_inf``, which ``torch.amp.GradScaler`` also sets, on the device.

    Args:
        optimizer: An optimizer created with ``fused=True``.
        skip: Boolean scalar on the device of the parameters.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
