"""Labelled images as rows of a batch: augmented views in training, the center crop in validation."""

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
View = tuple[Any, ...]  # an image or pixels [3, H, W], with the parameters of a batch transform if there is one; label


class LabelledImages:
    """Decode labelled images and collate their views.

    Args:
        classes: Number of classes.
        finish: Turns what the views have of their images into ``[n, 3, H, W]``.
    """

    def __init__(self, classes: int, finish: Callable[[tuple[Any, ...]], Tensor] = torch.stack) -> None:
        self.classes, self.finish = classes, finish

    def decode(self, record: dict[str, Any]) -> LabelledImage:
        """Return an RGB image and its label.

        Raises:
            ValueError: If the label is out of range or the image cannot be read.
        """
        if not 0 <= record["label"] < self.classes:
            raise ValueError(f"label {record['label']} of {self.classes} classes")
        return decode_image(record["image"]), record["label"]

    def compact(self, sample: LabelledImage) -> tuple[LabelledImage, int]:
        """Return a copy with only the pixels (no EXIF data, color profile or decoder), and its bytes."""
        image, label = sample
        pixels = image.copy()
        pixels.info.clear()
        return (pixels, label), 4 * pixels.width * pixels.height

    def collate(self, views: Sequence[View]) -> dict[str, Tensor]:
        """Return ``images`` [n, 3, H, W], ``labels`` [n] int64, and ``augment_params`` of a batch transform."""
        images, *params, labels = zip(*views, strict=True)
        columns = {"images": self.finish(images), "labels": torch.tensor(labels)}
        return columns | ({"augment_params": torch.stack(params[0])} if params else {})


class TrainTransform(LabelledImages):
    """Augmented views. It seeds the global generators: call it inside `preserve_rng_state`.

    Args:
        augment: The augmentation settings.
        img_size: Side of a view in pixels.
        seed: The seed of the phase.
        classes: Number of classes.
    """

    def __init__(self, augment: config.AugmentConfig, img_size: int, *, seed: int, classes: int) -> None:
        self.transform, finish = _halves(augment, img_size)
        super().__init__(classes, finish)
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
    """The center crop of an image.

    Args:
        augment: Has crop ratio, interpolation and normalization.
        img_size: Side of a view in pixels.
        classes: Number of classes.
    """

    def __init__(self, augment: config.AugmentConfig, img_size: int, *, classes: int) -> None:
        super().__init__(classes)
        self.transform = eval_transform(augment, img_size)

    def view(self, sample: LabelledImage, epoch: int, sample_id: int, repeat: int) -> View:
        """Return the one view."""
        image, label = sample
        return self.transform(image), label


def _halves(
    augment: config.AugmentConfig, img_size: int
) -> tuple[Callable[[Image.Image], View], Callable[[tuple[Any, ...]], Tensor]]:
    """Return a function for each image, and a function for all images of a batch."""
    if (transform := load_batch_transform(augment, img_size)) is not None:
        return transform, torch.stack
    if augment.erase:  # its noise is drawn image by image, after normalization
        whole = train_transform(augment, img_size)
        return lambda image: (whole(image),), torch.stack
    pictures = Compose(image_steps(augment, img_size))
    return lambda image: (pictures(image),), ToNormalized(augment).all
