"""The outcome of each image of an evaluation, for intervals and for the scores of classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..evaluation import ClassScore, bootstrap_intervals


class Outcomes:
    """Label, prediction and hits of each image: ten bytes per image.

    Args:
        images: Maximum number of images.
    """

    def __init__(self, images: int) -> None:
        self._hits = np.zeros(
            (images, 2), dtype=bool
        )  # whether the best prediction is right, and whether any of the best five is
        self._labels, self._predicted = (np.zeros(images, dtype=np.int32) for _ in range(2))
        self._count = 0

    def add(self, labels: Tensor, best: Tensor, hits: Tensor) -> None:
        """Add the images of a batch.

        Args:
            labels: Labels, ``[n]``.
            best: The best predictions, the most likely first, ``[n, k]``.
            hits: Whether each of them is right, ``[n, k]``.
        """
        own = slice(self._count, self._count + len(labels))
        self._labels[own], self._predicted[own] = labels.cpu().numpy(), best[:, 0].cpu().numpy()
        self._hits[own, 0], self._hits[own, 1] = hits[:, 0].cpu().numpy(), hits.any(dim=1).cpu().numpy()
        self._count += len(labels)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the 95% intervals of top-1 and top-5 accuracy in percent."""
        ends = 100 * bootstrap_intervals(self._hits[: self._count])
        return {name: (float(low), float(high)) for name, (low, high) in zip(("top1", "top5"), ends, strict=True)}

    def per_class(self, names: Sequence[str]) -> list[ClassScore]:
        """Return the top-1 accuracy of each class that has images, and the class that is most often predicted instead.

        Args:
            names: Names of the classes.
        """
        labels, predicted, right = (each[: self._count] for each in (self._labels, self._predicted, self._hits[:, 0]))
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(len(names) + 1))
        scores = []
        for name, first, last in zip(names, starts, starts[1:], strict=False):
            if first == last:
                continue
            own = order[first:last]
            wrong = np.bincount(predicted[own][~right[own]], minlength=len(names))
            worst = int(wrong.argmax())
            score = 100 * int(right[own].sum()) / len(own)
            mistaken = (names[worst], int(wrong[worst])) if wrong[worst] else (None, 0)
            scores.append(ClassScore(name, len(own), score, *mistaken))
        return scores
