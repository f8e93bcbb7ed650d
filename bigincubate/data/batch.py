"""Batches of named tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, n rows.

    A row is one view of a sample. With repeated augmentation, a batch may contain several views of a sample.

    Attributes:
        columns: The task's tensors by name, each ``[n, ...]``.
        sample_ids: ``[n]`` int64, index of the sample in its split.
        global_position: ``[n]`` int64, position p in the global batch.
        rank_sample_index: ``[n]`` int64, index i among the rows of this rank; on rank r of W, p = i * W + r.
    """

    columns: dict[str, Tensor]
    sample_ids: Tensor
    global_position: Tensor
    rank_sample_index: Tensor

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def nbytes(self) -> int:
        """The size of the columns in bytes."""
        return sum(column.nbytes for column in self.columns.values())

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def micro_batch(self, index: int, count: int) -> Batch:
        """Return micro-batch ``index`` of ``count``: the rows i with i mod count = index."""
        if count == 1:
            return self
        rows = (self.rank_sample_index % count == index).nonzero().squeeze(1)
        return self.map(lambda column: column[rows])

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy on ``device``; copying from pinned memory is asynchronous."""
        return self.map(lambda column: column.to(device, non_blocking=True))

    def first(self, count: int) -> Batch:
        """Return the first ``count`` rows."""
        return self.map(lambda column: column[:count])

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch with ``function`` applied to every tensor."""
        columns = {name: function(column) for name, column in self.columns.items()}
        return Batch(columns, *map(function, (self.sample_ids, self.global_position, self.rank_sample_index)))

    def with_column(self, name: str, column: Tensor) -> Batch:
        """Return a batch with a further column ``[n, ...]``."""
        return replace(self, columns={**self.columns, name: column})
