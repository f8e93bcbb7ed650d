"""Datasets of views: a sample has several views in training, and one in validation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ExternalError
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


class Views(Shards):
    """Samples as views; iterating yields them in the order of one rank. Iterate inside `preserve_rng_state`."""

    decoder: SampleTransform

    def __getitem__(self, at: Any) -> Row | ExternalError:
        try:
            sample = self.read(at)
        except ExternalError as error:
            return error
        return self.decoder.views(sample, self.epoch, at), at


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
