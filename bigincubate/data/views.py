"""Datasets of views: a sample has several views in training, and one in validation."""

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
    """Turns records into the columns of a batch, as a task needs them.

    Attributes:
        views_per_sample: Number of rows of a batch that a sample becomes.
    """

    views_per_sample: int

    def views(self, sample: Any, epoch: int, sample_id: int) -> list[Any]:
        """Return the views of a sample without changing it.

        They are a pure function of the sample, the seed, ``epoch`` and ``sample_id``.
        """

    def collate(self, views: Sequence[Any]) -> dict[str, Tensor]:
        """Return the columns of a batch, one row per view."""


class TrainViews(Shards):
    """Training samples as views, in the order of one rank. Iterate inside `preserve_rng_state`.

    Args:
        info: The data set.
        transform: Makes the views.
        order: Further arguments of `Shards`.
    """

    def __init__(self, info: DatasetInfo, transform: SampleTransform, **order: Any) -> None:
        super().__init__(info, "train", transform, **order)
        self.transform = transform

    def __getitem__(self, at: Any) -> Row | ExternalError:
        try:
            sample = self.read(at)
        except ExternalError as error:
            return error
        return self.transform.views(sample, self.epoch, at), at


class EvalViews(Dataset[Row | ExternalError]):
    """The samples ``ids`` of a split, one view each.

    Args:
        info: The data set.
        split: ``"train"`` or ``"val"``.
        transform: Makes the views.
        ids: Indices of the samples in the split.
        remote: A URL from which missing shards are downloaded.
    """

    def __init__(
        self, info: DatasetInfo, split: str, transform: SampleTransform, ids: range, *, remote: str | None = None
    ) -> None:
        self.shards, self.transform, self.ids = Shards(info, split, transform, remote=remote), transform, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> Row | ExternalError:
        try:
            sample = self.shards.read(self.ids[at])
        except ExternalError as error:
            return error
        return self.transform.views(sample, 0, self.ids[at]), self.ids[at]


def collate(transform: SampleTransform, rows: list[Row | ExternalError]) -> tuple[Any, Any]:
    """Return sample ids ``[n]`` and columns; or nothing and the first error.

    An error is returned because it would be wrapped in a traceback if a worker raised it. The ids are first because
    `StreamingDataLoader` takes the length of the first element.
    """
    for row in rows:
        if isinstance(row, ExternalError):
            return (), row
    views, ids = zip(*rows, strict=True)
    return torch.tensor(ids), transform.collate(list(chain.from_iterable(views)))
