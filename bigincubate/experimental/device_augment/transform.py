"""Augment images partly on the host and partly on the device.

The host reads and resizes an image and draws its parameters. One operator on the device (`operator.augment`) does
everything that does not change sizes. Random numbers come from the same generators in the same order as in
`tasks.image_classification.augment`, so with the same seed both implementations give a view the same crop, flip,
operation, factors and erased box. Only the noise in an erased box differs.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from ... import config
from ...errors import ConfigError
from ...tasks.image_classification.augment import corner, resized_crop, shorter_side
from ...tasks.image_classification.mixup import TwoHot, draw
from .operator import AMOUNT, BLUR, BOX, COLUMNS, DOWN, FLIP, GRAYSCALE, JITTER, NOISE, OPERATION, RIGHT, SOLARIZE
from .operator import augment as operator

NOISE_LENGTH = 1 << 20  # size of the pool of noise; float32 represents all indices below it exactly


class DeviceAugment:
    """Augment, normalize and mix a batch of images on the device: a `BatchTransform` of image classification.

    Results are equal to those of the host except that intermediate values are not rounded to integers.

    Args:
        augment: The augmentation settings of the phase.
        img_size: Side of the images in pixels, S.

    Raises:
        ConfigError: ``rand_augment`` is set, or a reflected border is at least as large as the image.
    """

    def __init__(self, augment: config.AugmentConfig, img_size: int) -> None:
        if augment.rand_augment:
            raise ConfigError(
                f'augment.rand_augment = "{augment.rand_augment}" is not supported by augment.batch_transform ='
                f" {augment.batch_transform}; use augment.three_augment, or no batch_transform"
            )
        self.augment, self.size = augment, img_size
        self.shifts = augment.crop in ("pad", "simple")
        self.resize = shorter_side(augment, img_size) if self.shifts else resized_crop(augment, img_size)
        self.color_jitter = transforms.ColorJitter(*[augment.color_jitter] * 3)
        self.erasing = RandomErasing(augment.erase, mode="const", device="cpu")

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Return pixels ``[3, S, S]`` uint8 and parameters ``[16]`` float32 of an RGB image.

        Uses the global random generators, which the caller must seed.
        """
        row = [0.0] * COLUMNS
        image = self.resize(image)
        pixels = np.asarray(image)
        if self.shifts:
            corners = corner(image, self.augment.pad, self.size)
            # crop inside the image; the device does the rest of the shift, because it adds the border
            top, left = (min(max(at, 0), side - self.size) for at, side in zip(corners, pixels.shape, strict=False))
            row[DOWN], row[RIGHT] = float(corners[0] - top), float(corners[1] - left)
            pixels = pixels[top : top + self.size, left : left + self.size]
        if self.augment.flip:  # the same draw as RandomHorizontalFlip
            row[FLIP] = float(torch.rand(1) < self.augment.flip)
        if self.augment.three_augment:
            row[OPERATION], row[AMOUNT] = _draw_three_augment()
        if self.augment.color_jitter:
            order, *factors, _ = self.color_jitter.get_params(
                self.color_jitter.brightness, self.color_jitter.contrast, self.color_jitter.saturation, None
            )
            kinds = [kind for kind in order.tolist() if kind < 3]  # 3 is hue, which does not change
            row[JITTER : JITTER + 6] = [float(value) for kind in kinds for value in (kind, factors[kind])]
        if self.augment.erase:
            recorder = _BoxRecorder(self.size)
            self.erasing(recorder)
            row[BOX : BOX + 4] = recorder.box
            row[NOISE] = float(torch.randint(NOISE_LENGTH, (1,)))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.tensor(row)

    def finish(self, images: Tensor, parameters: Tensor, mixing: Tensor | None = None) -> Tensor:
        """Return the finished images, ``[n, 3, S, S]`` float32 on the device of ``images``.

        Args:
            images: ``[n, 3, S, S]`` uint8.
            parameters: ``[n, 16]`` float32 on the same device.
            mixing: See `operator.augment`; None to mix nothing.
        """
        return operator(
            images,
            parameters,
            _noise(images.device) if self.augment.erase else None,
            mixing,
            self.augment.mean,
            self.augment.std,
            self.augment.crop == "simple",
            self.augment.three_augment,
            self.augment.color_jitter > 0,
        )

    def finish_and_mix(
        self, images: Tensor, parameters: Tensor, labels: Tensor, *, mixup: config.MixupConfig, seed: int, step: int
    ) -> tuple[Tensor, TwoHot]:
        """Return the finished images, mixed as in `mixup.blend`, and their targets."""
        ratio, box = draw(mixup, images.shape, seed=seed, step=step)
        if ratio == 1.0:
            return self.finish(images, parameters), TwoHot(labels, labels, 1.0)
        top, bottom, left, right = box or (0, 0, 0, 0)
        mixing = torch.tensor([1.0 if box else ratio, top, left, bottom, right]).to(images.device, non_blocking=True)
        return self.finish(images, parameters, mixing), TwoHot(labels, labels.roll(len(labels) // 2, 0), ratio)


def _draw_three_augment() -> tuple[float, float]:
    """Return an operation and its threshold or sigma, with the same draws as timm's policy "3a"."""
    operation = random.choice((SOLARIZE, GRAYSCALE, BLUR))
    if operation == BLUR:
        return operation, random.uniform(0.1, 2.0)
    return operation, 128.0


class _BoxRecorder:
    """A substitute for an image that records which box timm's RandomErasing erases."""

    dtype = torch.float32

    def __init__(self, size: int) -> None:
        self.shape, self.box = (3, size, size), [0.0] * 4

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, index: tuple[slice, slice, slice], value: Any) -> None:
        _, rows, columns = index
        self.box = [float(edge) for edge in (rows.start, columns.start, rows.stop, columns.stop)]


@cache
def _noise(device: torch.device) -> Tensor:
    """Return a pool of standard normal numbers, the same on every device."""
    return torch.randn(NOISE_LENGTH, generator=torch.Generator().manual_seed(0)).to(device)
