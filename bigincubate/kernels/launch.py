"""Choose between the Triton kernel and the eager reference."""

from __future__ import annotations

import os

from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """Return whether to run the Triton kernel: on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
