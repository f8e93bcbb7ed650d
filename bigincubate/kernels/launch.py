"""Where an operator runs its Triton body."""

from __future__ import annotations

import os

from torch import Tensor


def on_triton(x: Tensor) -> bool:
    """On a GPU; on a CPU under Triton's interpreter (``TRITON_INTERPRET=1``), which is how tests without a GPU run."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
