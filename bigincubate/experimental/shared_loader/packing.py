"""Store batches in anonymous shared memory."""

from __future__ import annotations

import math
import mmap
import os

import torch
from torch import Tensor

from ...data.batch import Batch

ALIGNMENT = 64  # bytes, the same as torch, because floating-point sums may depend on it

BOOKKEEPING = ("sample_ids", "global_position", "rank_sample_index")

Layout = dict[str, tuple[str, list[int], int]]  # column name -> dtype, shape, offset in bytes


def pack_batch(batch: Batch) -> tuple[Layout, int]:
    """Copy a batch to new shared memory, and return its layout and the file descriptor of the memory."""
    layout: Layout = {}
    size = 0
    columns = {**batch.columns, **{name: getattr(batch, name) for name in BOOKKEEPING}}
    for name, column in columns.items():
        layout[name] = (str(column.dtype).removeprefix("torch."), list(column.shape), size)
        size += math.ceil(column.nbytes / ALIGNMENT) * ALIGNMENT
    descriptor = os.memfd_create("bigincubate-batch")
    os.ftruncate(descriptor, size)
    with open(descriptor, "wb", closefd=False) as memory:  # twice as fast as mmap, which has one page fault per page
        for name, column in columns.items():
            memory.seek(layout[name][2])
            memory.write(memoryview(column.contiguous().numpy()).cast("B"))
    return layout, descriptor


def unpack_batch(layout: Layout, descriptor: int) -> Batch:
    """Return the batch and close the descriptor.

    The batch is not copied (with CUDA, it is copied to pinned memory). Other processes do not see changes to it.
    """
    try:
        memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    columns = {name: _view(memory, *entry) for name, entry in layout.items()}
    if torch.cuda.is_available():
        columns = {name: column.pin_memory() for name, column in columns.items()}
    bookkeeping = {name: columns.pop(name) for name in BOOKKEEPING}
    return Batch(columns, **bookkeeping)


def _view(memory: mmap.mmap, dtype: str, shape: list[int], offset: int) -> Tensor:
    flat = torch.frombuffer(memory, dtype=getattr(torch, dtype), count=math.prod(shape), offset=offset)
    return flat.view(shape)
