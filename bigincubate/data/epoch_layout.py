"""Which samples an epoch uses, and how they are divided into global batches and over ranks and workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

REPEATED_MULTIPLE = 256  # with repeated augmentation, the rows of an epoch are a multiple of this, as in DeiT


@dataclass(frozen=True)
class EpochLayout:
    """The layout of an epoch: the position in the shuffled samples that each row of each batch comes from.

    With ``repeats`` R = 1, the rows of an epoch are the shuffled samples. With R > 1 this is the repeated augmentation
    of DeiT (``RASampler``): each shuffled sample is repeated R times in a row, and only the first
    floor(N / 256) * 256 rows are used. An epoch is therefore as long as without repeats and uses about N / R samples.

    The rows are divided into global batches of ``batch_size``. An incomplete last batch is dropped, and the rows of one
    sample may be in two batches. Rank r of W has the rows p with p mod W = r of each batch.

    Attributes:
        samples: Number of samples, N.
        batch_size: Rows of a global batch.
        repeats: Rows per sample, R.
        rank: This rank, r.
        world: Number of ranks, W, a divisor of ``batch_size``.
    """

    samples: int
    batch_size: int
    repeats: int = 1
    rank: int = 0
    world: int = 1

    @property
    def steps(self) -> int:
        """Return the number of batches in an epoch."""
        multiple = REPEATED_MULTIPLE if self.repeats > 1 else 1
        return self.samples // multiple * multiple // self.batch_size

    def check(self, path: str | None = None) -> None:
        """Check that an epoch has at least one batch.

        Args:
            path: Path of the data set, for the error message.

        Raises:
            ConfigError: If there are too few samples for one batch.
        """
        if self.steps:
            return
        where = path or "the training split"
        message = f"train.batch_size = {self.batch_size}, but {where} has only {self.samples} samples; lower it"
        if self.repeats > 1:
            message += f" (with augment.repeated_aug, the rows of an epoch are a multiple of {REPEATED_MULTIPLE})"
        raise ConfigError(message)

    def select(self, first_step: int, worker: int = 0, workers: int = 1) -> WorkerRows:
        """Return the rows that a loader worker of this rank loads, in order, starting at a step of the epoch.

        Worker w of V loads the batches ``first_step`` + w, ``first_step`` + w + V, ``first_step`` + w + 2 V and so on.
        """
        return WorkerRows(self, first_step + worker, workers)


@dataclass(frozen=True)
class WorkerRows:
    """The rows of an epoch that one loader worker loads. They are computed when needed, so they take no memory.

    Attributes:
        layout: The layout of the epoch.
        first_step: The first batch.
        stride: The difference between the numbers of successive batches.
    """

    layout: EpochLayout
    first_step: int
    stride: int

    def __len__(self) -> int:
        batches = range(self.first_step, self.layout.steps, self.stride)
        return len(batches) * (self.layout.batch_size // self.layout.world)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        """Return the position of a row in the shuffled samples, and its repeat number, from 0 to R - 1.

        Args:
            index: An index, or ``[n]`` indexes; not checked.
        """
        layout = self.layout
        batch, row = divmod(index, layout.batch_size // layout.world)
        step = self.first_step + batch * self.stride
        return divmod(step * layout.batch_size + layout.rank + row * layout.world, layout.repeats)
