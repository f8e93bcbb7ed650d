"""Datasets of views. A view is an augmented sample, one row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ExternalError
from .dataset import DatasetInfo
from .epoch_layout import EpochLayout, WorkerRows
from .shards import RecordDecoder, Shards

Row = tuple[Any, int]  # a view and the id of its sample


class SampleTransform(RecordDecoder, Protocol):
    """Converts records to the columns of a batch that a task needs."""

    def view(self, sample: Any, epoch: int, sample_id: int, repeat: int) -> Any:
        """Return a view of a sample without changing the sample.

        The view is a pure function of the sample, the seed, ``epoch``, ``sample_id`` and ``repeat``, the index of the
        view among those of the sample in an epoch.
        """

    def collate(self, views: Sequence[Any]) -> dict[str, Tensor]:
        """Return the columns of a batch, one row per view."""


class Views(Shards):
    """The samples of a split, one view each."""

    decoder: SampleTransform

    def make_view(self, sample_id: int, repeat: int) -> Row | ExternalError:
        """Return a view of a sample in the current epoch, or the error if the sample cannot be read."""
        try:
            sample = self.read(sample_id)
        except ExternalError as error:
            return error
        return self.decoder.view(sample, self.epoch, sample_id, repeat), sample_id

    def __getitem__(self, at: Any) -> Row | ExternalError:
        return self.make_view(at, 0)


class TrainViews(Views):
    """Views of training samples. Iteration yields those of one rank; iterate inside `preserve_rng_state`.

    Args:
        info: The data set.
        transform: Computes the views.
        layout: Determines the views of an epoch.
        order: Further arguments of `Shards`.
    """

    def __init__(self, info: DatasetInfo, transform: SampleTransform, layout: EpochLayout, **order: Any) -> None:
        super().__init__(info, "train", transform, **order)
        self.layout = layout

    def select(self, first_row: int, worker: int, workers: int) -> WorkerRows:
        """Return the rows of a worker, starting at a row of the epoch."""
        return self.layout.select(first_row // self.layout.batch_size, worker, workers)

    def __getitem__(self, at: Any) -> Row | ExternalError:
        """Return the view ``(sample id, repeat)``."""
        return self.make_view(*at)


def collate(transform: SampleTransform, rows: list[Row | ExternalError]) -> tuple[Any, Any]:
    """Return sample ids ``[n]`` and columns; or an empty tuple and the first error.

    An error is returned, because an error that a worker raises is wrapped in a traceback. The ids come first, because
    `StreamingDataLoader` uses the length of the first element.
    """
    for row in rows:
        if isinstance(row, ExternalError):
            return (), row
    views, ids = zip(*rows, strict=True)
    return torch.tensor(ids), transform.collate(views)
