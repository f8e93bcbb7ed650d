"""Convert labelled images to rows of a batch: augmented views in training, center crops in validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from ... import config
from ...data.images import decode_image
from ...data.rng import seed_rng
from .augment import ToNormalized, draws_only_from_torch, eval_transform, image_steps, train_transform
from .batch_transform import load_batch_transform

LabelledImage = tuple[Image.Image, int]
# an image or its pixels [3, H, W], the parameters of a batch transform (if there is one), and the label
View = tuple[Any, ...]


class LabelledImages:
    """Decode labelled images and collate their views.

    Args:
        classes: Number of classes.
        finish: Converts the images of all views to one tensor ``[n, 3, H, W]``.
        apply_exif: Whether to turn images as their EXIF orientation says.
        max_pixels: Maximum number of pixels of an image. None: Pillow's limit.
    """

    def __init__(
        self,
        classes: int,
        finish: Callable[[tuple[Any, ...]], Tensor] = torch.stack,
        *,
        apply_exif: bool = False,
        max_pixels: int | None = None,
    ) -> None:
        self.classes, self.finish = classes, finish
        self.apply_exif, self.max_pixels = apply_exif, max_pixels

    def decode(self, record: dict[str, Any]) -> LabelledImage:
        """Return an RGB image and its label.

        Raises:
            ValueError: The label is out of range, or the image cannot be read.
        """
        if not 0 <= record["label"] < self.classes:
            raise ValueError(f"label {record['label']} is not in 0 to {self.classes - 1}")
        image = decode_image(record["image"], apply_exif=self.apply_exif, max_pixels=self.max_pixels)
        return image, record["label"]

    def compact(self, sample: LabelledImage) -> tuple[LabelledImage, int]:
        """Return a copy with only pixels and label (no EXIF data, color profile or decoder), and its size in bytes."""
        image, label = sample
        pixels = image.copy()
        pixels.info.clear()
        return (pixels, label), 4 * pixels.width * pixels.height

    def collate(self, views: Sequence[View]) -> dict[str, Tensor]:
        """Return ``images`` [n, 3, H, W], ``labels`` [n] int64 and, for a batch transform, ``augment_params``."""
        images, *params, labels = zip(*views, strict=True)
        columns = {"images": self.finish(images), "labels": torch.tensor(labels)}
        return columns | ({"augment_params": torch.stack(params[0])} if params else {})


class TrainTransform(LabelledImages):
    """Create augmented views. This seeds the global random generators, so use it inside `preserve_rng_state`.

    Args:
        augment: The augmentation settings.
        img_size: Side of a view in pixels.
        seed: The seed of the phase.
        classes: Number of classes.
        max_pixels: Maximum number of pixels of an image. None: Pillow's limit.
    """

    def __init__(
        self, augment: config.AugmentConfig, img_size: int, *, seed: int, classes: int, max_pixels: int | None = None
    ) -> None:
        self.transform, finish = _image_and_batch_transform(augment, img_size)
        super().__init__(classes, finish, apply_exif=augment.exif == "apply", max_pixels=max_pixels)
        self.seed, self.distinct_epochs = seed, augment.distinct_epochs
        self.torch_only = draws_only_from_torch(augment)

    def view(self, sample: LabelledImage, epoch: int, sample_id: int, repeat: int) -> View:
        """Return a view that is a function of (seed, epoch, sample_id, repeat)."""
        image, label = sample
        if self.distinct_epochs is not None:
            epoch %= self.distinct_epochs
        seed_rng(self.seed, epoch, sample_id, repeat, torch_only=self.torch_only)
        return (*self.transform(image), label)


class EvalTransform(LabelledImages):
    """Create center crops.

    Args:
        augment: The augmentation settings, for EXIF orientation, crop ratio, interpolation and normalization.
        img_size: Side of a view in pixels.
        classes: Number of classes.
        max_pixels: Maximum number of pixels of an image. None: Pillow's limit.
    """

    def __init__(
        self, augment: config.AugmentConfig, img_size: int, *, classes: int, max_pixels: int | None = None
    ) -> None:
        super().__init__(classes, apply_exif=augment.exif == "apply", max_pixels=max_pixels)
        self.transform = eval_transform(augment, img_size)

    def view(self, sample: LabelledImage, epoch: int, sample_id: int, repeat: int) -> View:
        """Return the center crop."""
        image, label = sample
        return self.transform(image), label


def _image_and_batch_transform(
    augment: config.AugmentConfig, img_size: int
) -> tuple[Callable[[Image.Image], View], Callable[[tuple[Any, ...]], Tensor]]:
    """Return the part of the transform that is applied per image, and the part that is applied per batch."""
    if (transform := load_batch_transform(augment, img_size)) is not None:
        return transform, torch.stack
    if augment.erase:  # erasing follows normalization and draws its noise image by image
        transform_with_erasing = train_transform(augment, img_size)
        return lambda image: (transform_with_erasing(image),), torch.stack
    transform_image = Compose(image_steps(augment, img_size))
    return lambda image: (transform_image(image),), ToNormalized(augment).all
