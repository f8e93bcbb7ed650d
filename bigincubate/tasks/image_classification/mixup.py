"""Mixup and CutMix for a batch that is divided among ranks and micro-batches.

The global batch has one mixing ratio, one choice between Mixup and CutMix and one box, which are functions of
(seed, step). The partner of position p is (p + B/2) mod B. Rank r of W has the positions p with p mod W = r, and
micro-batch m of M has the rows i of its rank with i mod M = m. If B is a multiple of 2 W M, partners are therefore in
the same micro-batch, half of its rows apart, and mixing each micro-batch separately equals mixing the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, one_hot
from torch import Tensor

from ... import config
from ...config.seeds import MIX
from ...data.rng import seeded_rng


@dataclass(frozen=True)
class TwoHot:
    """Targets of n rows, each with two classes.

    Attributes:
        labels: [n] int64, the first class.
        partners: [n] int64, the second class.
        share: Probability of the first class, in [0, 1]; that of the second class is 1 - share.
    """

    labels: Tensor
    partners: Tensor
    share: float

    def dense(self, num_classes: int, smoothing: float) -> Tensor:
        """Return probabilities, [n, num_classes] float32.

        Args:
            num_classes: Number of classes.
            smoothing: Fraction of each target that is spread evenly over all classes.
        """
        off = smoothing / num_classes

        def of(labels: Tensor) -> Tensor:
            return one_hot(labels, num_classes, on_value=1.0 - smoothing + off, off_value=off)

        if self.share == 1.0:
            return of(self.labels)
        return of(self.labels) * self.share + of(self.partners) * (1.0 - self.share)


def blend(images: Tensor, labels: Tensor, *, mixup: config.MixupConfig, seed: int, step: int) -> tuple[Tensor, TwoHot]:
    """Mix each row i of a micro-batch with row (i - n/2) mod n: timm's batch mode with other partners.

    Args:
        images: [n, 3, H, W] float; not modified.
        labels: [n] int64.
        mixup: The mixing settings.
        seed: Seed of the run.
        step: Optimizer step; all random numbers are functions of seed and step.

    Returns:
        Mixed images [n, 3, H, W] and their targets.
    """
    ratio, box = draw(mixup, images.shape, seed=seed, step=step)
    if ratio == 1.0:
        return images, TwoHot(labels, labels, 1.0)
    half = len(images) // 2
    partners = images.roll(half, 0)
    if box is None:
        images = images * ratio + partners * (1.0 - ratio)
    else:
        top, bottom, left, right = box
        images = images.clone()
        images[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return images, TwoHot(labels, labels.roll(half, 0), ratio)


def draw(
    mixup: config.MixupConfig, shape: torch.Size, *, seed: int, step: int
) -> tuple[float, tuple[int, int, int, int] | None]:
    """Draw the mixing ratio and, for CutMix, the box of a batch.

    Args:
        mixup: The mixing settings.
        shape: Shape of the images, [n, 3, H, W].
        seed: Seed of the run.
        step: Optimizer step.

    Returns:
        The weight of the image itself, in [0, 1], and for CutMix the box of its partner (top, bottom, left, right).
    """
    if not mixup.active:
        return 1.0, None
    with seeded_rng(MIX, seed, step):
        rule = Mixup(mixup.mixup, mixup.cutmix, prob=mixup.prob, switch_prob=mixup.switch_prob)
        ratio, cut = rule._params_per_batch()
        if not cut or ratio == 1.0:
            return float(ratio), None
        (top, bottom, left, right), ratio = cutmix_bbox_and_lam(shape, ratio)
        return float(ratio), (int(top), int(bottom), int(left), int(right))
