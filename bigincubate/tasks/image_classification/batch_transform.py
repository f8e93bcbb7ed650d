"""Augmentation in two halves, one per image on the host and one per batch on the device, loaded by name."""

from __future__ import annotations

from typing import Protocol

from PIL import Image
from torch import Tensor

from ... import config
from ...config.objects import load_object
from .mixup import TwoHot


class BatchTransform(Protocol):
    """Replaces the training transform and the mixing of images.

    ``augment.batch_transform = "package.module:Class"`` chooses one.

    Args:
        augment: The augmentation settings of the phase.
        img_size: Side of the images in pixels.

    Raises:
        ConfigError: It does not support these settings.
    """

    def __init__(self, augment: config.AugmentConfig, img_size: int) -> None: ...

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Return the host half of an RGB image: its pixels and its parameters, each of a fixed shape.

        It may draw from the global random generators, which are seeded before. Both tensors are stacked over the batch.
        """
        ...

    def finish(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Return the device half of a batch, ``[n, 3, H, W]`` float32, not mixed."""
        ...

    def finish_and_mix(
        self, images: Tensor, parameters: Tensor, labels: Tensor, *, mixup: config.MixupConfig, seed: int, step: int
    ) -> tuple[Tensor, TwoHot]:
        """Return the device half of a batch, mixed as `mixup.blend` mixes, and its targets."""
        ...


def load_batch_transform(augment: config.AugmentConfig, img_size: int) -> BatchTransform | None:
    """Return the transform that ``augment.batch_transform`` names, or None if it names none.

    Raises:
        ConfigError: The name cannot be loaded, or the transform does not support these settings.
    """
    if (name := augment.batch_transform) is None:
        return None
    transform: BatchTransform = load_object(name, key="augment.batch_transform")(augment, img_size)
    return transform
