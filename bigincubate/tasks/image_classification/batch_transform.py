"""Augmentation in two parts, loaded by name: one per image on the CPU, and one per batch on the device."""

from __future__ import annotations

from typing import Protocol

from PIL import Image
from torch import Tensor

from ... import config
from ...config.objects import load_object
from .mixup import TwoHot


class BatchTransform(Protocol):
    """A class that replaces the training transform and the mixing of images.

    Selected by ``augment.batch_transform = "package.module:Class"``.

    Args:
        augment: The augmentation settings of the phase.
        img_size: Side of the images in pixels.

    Raises:
        ConfigError: It does not support these settings.
    """

    def __init__(self, augment: config.AugmentConfig, img_size: int) -> None: ...

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Apply the CPU part to an RGB image and return its pixels and its parameters, each of a fixed shape.

        It may use the global random generators, which are seeded before each call. Both tensors are stacked over the
        batch.
        """

    def finish(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Apply the device part to a batch; return ``[n, 3, H, W]`` float32, not mixed."""

    def finish_and_mix(
        self, images: Tensor, parameters: Tensor, labels: Tensor, *, mixup: config.MixupConfig, seed: int, step: int
    ) -> tuple[Tensor, TwoHot]:
        """Apply the device part to a batch, mix it as in `mixup.blend`, and return it with its targets."""


def load_batch_transform(augment: config.AugmentConfig, img_size: int) -> BatchTransform | None:
    """Return the transform that ``augment.batch_transform`` names, or None if it names none.

    Raises:
        ConfigError: The name cannot be loaded, or the transform does not support these settings.
    """
    if (name := augment.batch_transform) is None:
        return None
    return load_object(name, "augment", "img_size", key="augment.batch_transform")(augment, img_size)
