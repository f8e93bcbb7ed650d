"""Deterministic kernels on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from ..errors import ConfigError


@contextmanager
def deterministic_algorithms(device: torch.device, enabled: bool) -> Iterator[None]:
    """Use only deterministic kernels on a GPU, and restore PyTorch's settings afterwards.

    Otherwise, the backward pass of fused attention adds partial sums in the order in which thread blocks finish. On a
    CPU this does nothing, because the kernels used there are deterministic.

    Args:
        device: The device that the model runs on.
        enabled: Whether to change the settings.

    Raises:
        ConfigError: The model has an operator for which PyTorch has no deterministic kernel.
    """
    if device.type != "cuda" or not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    settings: Any = torch.utils.deterministic  # its attributes are not declared
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    # with "warn", fused attention would keep its fastest, nondeterministic kernel
    torch.set_deterministic_debug_mode("error")
    settings.fill_uninitialized_memory = False  # slow, and only for finding operators that read uninitialized memory
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operator = str(error).split(" does not have")[0]
        raise ConfigError(f"{operator} has no deterministic kernel: set train.deterministic=false") from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]
