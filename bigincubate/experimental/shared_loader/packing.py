"""A batch in anonymous shared memory."""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import fields

import torch
from torch import Tensor

from ...data.streams import Batch

ALIGNMENT = 64  # bytes, as torch's own memory has: sums may depend on it

Layout = dict[str, tuple[str, list[int], int]]  # column name -> dtype, shape, offset in bytes


def pack_batch(batch: Batch) -> tuple[Layout, int]:
    """Return the layout of a batch and the descriptor of new memory that holds it."""
    layout: Layout = {}
    size = 0
    columns = {name: column for name in _column_names() if (column := getattr(batch, name)) is not None}
    for name, column in columns.items():
        layout[name] = (str(column.dtype).removeprefix("torch."), list(column.shape), size)
        size += math.ceil(column.nbytes / ALIGNMENT) * ALIGNMENT
    descriptor = os.memfd_create("bigincubate-batch")
    os.ftruncate(descriptor, size)
    with open(descriptor, "wb", closefd=False) as memory:  # half the time of a map, whose pages fault one by one
        for name, column in columns.items():
            memory.seek(layout[name][2])
            memory.write(memoryview(column.contiguous().numpy()).cast("B"))
    return layout, descriptor


def unpack_batch(layout: Layout, descriptor: int) -> Batch:
    """Return the batch and close the descriptor.

    The batch is not copied (with CUDA, it is copied into pinned memory). Writing to it changes no other process's.
    """
    try:
        memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    columns = {name: _view(memory, *layout[name]) for name in _column_names() if name in layout}
    if torch.cuda.is_available():
        columns = {name: column.pin_memory() for name, column in columns.items()}
    return Batch(**columns)


def _view(memory: mmap.mmap, dtype: str, shape: list[int], offset: int) -> Tensor:
    flat = torch.frombuffer(memory, dtype=getattr(torch, dtype), count=math.prod(shape), offset=offset)
    return flat.view(shape)


def _column_names() -> list[str]:
    return [field.name for field in fields(Batch)]
