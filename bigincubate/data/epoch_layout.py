"""Which samples an epoch shows, and how they are cut into global batches, ranks and workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

REPEATED_MULTIPLE = 256  # with repeated augmentation, an epoch shows a multiple of so many images, as in DeiT


@dataclass(frozen=True)
class EpochLayout:
    """The layout of an epoch: which position of the shuffled samples each row of each batch comes from.

    With ``repeats`` R = 1, the rows of an epoch are the shuffled samples. With R > 1 this is the repeated augmentation
    of DeiT (``RASampler``): each shuffled sample is taken R times in succession, and only the first
    floor(N / 256) * 256 rows are used. So an epoch is as long as without repeats and shows about N / R samples.

    The rows are cut into global batches of ``batch_size``; what is left at the end is not used, and a batch may end
    between two rows of one sample. Rank r of W has the rows p with p mod W = r of each batch.

    Attributes:
        samples: Number of samples, N.
        batch_size: Rows of a global batch.
        repeats: Rows of each sample, R.
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
        """Refuse an epoch without a batch.

        Args:
            path: The data set, for the message.

        Raises:
            ConfigError: If there are too few samples for one batch.
        """
        if self.steps:
            return
        holder = f"{path} holds" if path else "the training split has"
        lower = "lower train.batch_size"
        if self.repeats > 1:
            lower += f" (with augment.repeated_aug, an epoch has a multiple of {REPEATED_MULTIPLE} rows)"
        raise ConfigError(f"a batch takes {self.batch_size} samples, {holder} {self.samples}: {lower}")

    def select(self, first_step: int, worker: int = 0, workers: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows that a loader worker of this rank makes, in its order, from a step of the epoch on.

        Worker w of V makes the batches ``first_step`` + w, + V, + 2 V and so on.

        Returns:
            ``[n]`` positions in the shuffled samples, and ``[n]`` numbers in 0 to R - 1, which count the rows of a
            sample.
        """
        steps = np.arange(first_step + worker, self.steps, workers)
        own = np.arange(self.rank, self.batch_size, self.world)
        rows = (steps[:, None] * self.batch_size + own).ravel()
        return rows // self.repeats, rows % self.repeats
