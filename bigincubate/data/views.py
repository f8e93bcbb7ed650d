"""What is read of a sample: its views in training, one view in validation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ExternalError
from .dataset import DatasetInfo
from .shards import RecordDecoder, Shards

Row = tuple[list[Any], int]  # the views of a sample, and its id


class SampleTransform(RecordDecoder, Protocol):
    """How a task turns records into the columns of a batch.

    Attributes:
        views_per_sample: how many rows of a batch a sample becomes.
    """

    views_per_sample: int

    def views(self, sample: Any, epoch: int, sample_id: int) -> list[Any]:
        """Return the views of a sample, which must not be changed.

        What is random about them is a pure function of the seed, ``epoch`` and ``sample_id``.
        """

    def collate(self, views: Sequence[Any]) -> dict[str, Tensor]:
        """Return the columns of a batch, one row per view."""


class TrainViews(Shards):
    """Training samples as views, in the order of one rank. Iterate inside `preserve_rng_state`."""

    def __init__(self, info: DatasetInfo, transform: SampleTransform, **order: Any) -> None:
        super().__init__(info, "train", transform, **order)
        self.transform = transform

    def __getitem__(self, at: Any) -> Row | ExternalError:
        try:
            sample = self.read(at)
        except ExternalError as fault:
            return fault
        return self.transform.views(sample, self.epoch, at), at


class EvalViews(Dataset[Row | ExternalError]):
    """The samples ``ids`` of a split, one view each."""

    def __init__(
        self, info: DatasetInfo, split: str, transform: SampleTransform, ids: range, *, remote: str | None = None
    ) -> None:
        self.shards, self.transform, self.ids = Shards(info, split, transform, remote=remote), transform, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> Row | ExternalError:
        try:
            sample = self.shards.read(self.ids[at])
        except ExternalError as fault:
            return fault
        return self.transform.views(sample, 0, self.ids[at]), self.ids[at]


def collate(transform: SampleTransform, rows: list[Row | ExternalError]) -> tuple[Any, Any]:
    """Return columns and sample ids ``[n]``, or None and the first fault.

    A fault travels as a value: raised in a worker, it would arrive wrapped in a traceback.
    """
    for row in rows:
        if isinstance(row, ExternalError):
            return None, row
    views, ids = zip(*rows, strict=True)
    return transform.collate(list(chain.from_iterable(views))), torch.tensor(ids)
