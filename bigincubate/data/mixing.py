"""Mixup and CutMix for a batch that is cut over ranks and micro-batches.

What is drawn belongs to the global batch: one mixing ratio, one choice, one box, a function of (seed, step). The
partner of position p is (p + B/2) mod B. Rank r of W holds the samples j with j mod W = r and micro-batch m of M those
of its samples i with i mod M = m, so where the B/R samples of a batch (R views of each) are a multiple of 2 W M,
partners always sit in the same micro-batch, half of its rows apart. Hence mixing each micro-batch for itself *is*
mixing the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, one_hot
from torch import Tensor

from .. import config
from ..seeds import MIX
from .augment import seeded


@dataclass(frozen=True)
class TwoHot:
    """Targets of n rows: ``share`` of one class each, the rest of another."""

    labels: Tensor  # [n] int64
    partners: Tensor  # [n] int64
    share: float  # in [0, 1]

    def dense(self, num_classes: int, smoothing: float) -> Tensor:
        """[n, num_classes] float32 that sum to one, ``smoothing`` of each spread over all classes."""
        off = smoothing / num_classes

        def of(labels: Tensor) -> Tensor:
            return one_hot(labels, num_classes, on_value=1.0 - smoothing + off, off_value=off)

        if self.share == 1.0:
            return of(self.labels)
        return of(self.labels) * self.share + of(self.partners) * (1.0 - self.share)


def blend(images: Tensor, labels: Tensor, *, mixup: config.Mixup, seed: int, step: int) -> tuple[Tensor, TwoHot]:
    """Mix the rows of one micro-batch with the rows half of it away (timm's batch mode, other partners).

    Args:
        images: [n, 3, H, W] float. labels: [n] int64. seed, step: what is drawn depends on these alone.

    Returns:
        images [n, 3, H, W], new where something was mixed, and their targets.
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


def mix(
    images: Tensor, labels: Tensor, *, mixup: config.Mixup, smoothing: float, num_classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """:func:`blend`, with targets [n, num_classes] float32 that sum to one."""
    images, targets = blend(images, labels, mixup=mixup, seed=seed, step=step)
    return images, targets.dense(num_classes, smoothing)


def draw(
    mixup: config.Mixup, shape: torch.Size, *, seed: int, step: int
) -> tuple[float, tuple[int, int, int, int] | None]:
    """The share of the image itself in [0, 1], and for CutMix the box (top, bottom, left, right) of its partner."""
    if not mixup.active:
        return 1.0, None
    with seeded(MIX, seed, step):
        rule = Mixup(mixup.mixup, mixup.cutmix, prob=mixup.prob, switch_prob=mixup.switch_prob)
        ratio, cut = rule._params_per_batch()
        if not cut or ratio == 1.0:
            return float(ratio), None
        (top, bottom, left, right), ratio = cutmix_bbox_and_lam(shape, ratio)
        return float(ratio), (int(top), int(bottom), int(left), int(right))
