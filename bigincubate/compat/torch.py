"""Uses of undocumented behavior of torch: optimizers, data loaders, flight recorder and memory snapshots."""

from __future__ import annotations

import multiprocessing.queues
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
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


def loader_processes(iterator: Any) -> Sequence[BaseProcess]:
    """Return the worker processes of an iterator over a `DataLoader`; none if it has no workers."""
    return getattr(iterator, "_workers", ())


def report_lost_batches(describe: Callable[[Exception], Exception]) -> None:
    """In a loader worker, send an error to the main process in place of a batch that cannot be sent.

    A worker sends its batches in a thread, which moves their tensors to shared memory. By default, this thread prints
    its errors and drops the batch, and the main process waits for the batch forever. Here the main process receives
    ``((), error)``, the value of a batch that could not be loaded (`data.views.collate`).

    Args:
        describe: Returns the error to send for the error of the thread.
    """

    def send_error(self: Any, error: Exception, batch: Any) -> None:
        if isinstance(batch, tuple) and len(batch) == 2:  # the index of the batch, and the batch
            self.put((batch[0], ((), describe(error))))
        else:
            print(f"a loader worker cannot send to the main process: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # the main process is told by SIGCHLD

    multiprocessing.queues.Queue._on_queue_feeder_error = send_error  # type: ignore[attr-defined]


def read_flight_recorder(backend: str, *, stacks: bool) -> bytes:
    """Return the last collectives of this rank as torch's flight recorder stores them: a pickle for `torchfrtrace`.

    Depending on the version of torch and on ``TORCH_DIST_USE_NCCL2``, the backend ``nccl`` uses one of several
    recorders. The others are empty, so the longest dump is returned.

    Args:
        backend: ``gloo`` or ``nccl``.
        stacks: Whether to include Python stacks. The first dump with stacks in a process takes several seconds.

    Returns:
        The pickle; empty if no recorder of this backend exists.
    """
    from torch._C import _distributed_c10d as c10d

    if backend == "gloo":
        return bytes(c10d._dump_fr_trace(True, stacks, False))
    dumps = [bytes(c10d._dump_nccl_trace(True, stacks, False))] if hasattr(c10d, "_dump_nccl_trace") else []
    with suppress(TypeError):  # before torch 2.15, there is one recorder for all backends but NCCL
        dumps += [bytes(c10d._dump_fr_trace(True, stacks, False, name)) for name in ("nccl", "nccl2")]
    return max(dumps, key=len, default=b"")


def record_memory_history() -> None:
    """Start recording the last million allocations on the current GPU, with Python stacks."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=1_000_000)


def write_memory_snapshot(file: Path) -> None:
    """Write the recorded allocations, for https://pytorch.org/memory_viz, and stop recording."""
    try:
        torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
