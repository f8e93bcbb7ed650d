"""Augmentation in two halves: here on the host an image is read, resized and its parameters are drawn; what does
not change sizes is one operator on the device (`bigincubate.kernels.augment`).

Draws come from the same generators in the same order as in `bigincubate.tasks.image_classification.augment`, so with the same seed a view
gets the same crop, flip, operation, factors and box on either way. Only the noise in an erased box is other noise.
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
from ...tasks.image_classification.augment import corner, resized_crop, shorter_side
from ...tasks.image_classification.mixup import TwoHot, draw
from .operator import AMOUNT, BLUR, BOX, COLUMNS, DOWN, FLIP, GREYSCALE, JITTER, NOISE, OPERATION, RIGHT, SOLARISE
from .operator import augment as operator

TAPE = 1 << 20  # numbers of noise; a place among them is exact in float32


class HalfTransform:
    """RGB image -> uint8 [3, img_size, img_size] and its parameters [16] float32. Random: call it after `reseed`."""

    def __init__(self, augment: config.Augment, img_size: int) -> None:
        self.augment, self.size = augment, img_size
        self.shifts = augment.crop in ("pad", "simple")
        self.fit = shorter_side(augment, img_size) if self.shifts else resized_crop(augment, img_size)
        self.colours = transforms.ColorJitter(*[augment.color_jitter] * 3)
        self.erasing = RandomErasing(augment.erase, mode="const", device="cpu")

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        row = [0.0] * COLUMNS
        image = self.fit(image)
        pixels = np.asarray(image)
        if self.shifts:
            places = corner(image, self.augment.pad, self.size)
            # cut as far as there is image; what is left of the shift is the device's, for it has the border
            top, left = (min(max(at, 0), side - self.size) for at, side in zip(places, pixels.shape, strict=False))
            row[DOWN], row[RIGHT] = float(places[0] - top), float(places[1] - left)
            pixels = pixels[top : top + self.size, left : left + self.size]
        if self.augment.flip:  # as RandomHorizontalFlip draws
            row[FLIP] = float(torch.rand(1) < self.augment.flip)
        if self.augment.three_augment:
            row[OPERATION], row[AMOUNT] = _three_augment()
        if self.augment.color_jitter:
            order, *factors, _ = self.colours.get_params(
                self.colours.brightness, self.colours.contrast, self.colours.saturation, None
            )
            kinds = [kind for kind in order.tolist() if kind < 3]  # 3: hue, which is not jittered
            row[JITTER : JITTER + 6] = [float(value) for kind in kinds for value in (kind, factors[kind])]
        if self.augment.erase:
            seen = _Boxes(self.size)
            self.erasing(seen)
            row[BOX : BOX + 4] = seen.box
            row[NOISE] = float(torch.randint(TAPE, (1,)))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.tensor(row)


def _three_augment() -> tuple[float, float]:
    """Which operation, and its threshold or sigma, drawn as timm draws from its policy "3a"."""
    operation = random.choice((SOLARISE, GREYSCALE, BLUR))
    if operation == BLUR:
        return operation, random.uniform(0.1, 2.0)
    return operation, 128.0


class _Boxes:
    """An image for timm's RandomErasing that remembers what was erased."""

    dtype = torch.float32

    def __init__(self, size: int) -> None:
        self.shape, self.box = (3, size, size), [0.0] * 4

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, index: tuple[slice, slice, slice], value: Any) -> None:
        _, rows, columns = index
        self.box = [float(edge) for edge in (rows.start, columns.start, rows.stop, columns.stop)]


def finish(images: Tensor, parameters: Tensor, augment: config.Augment, mixing: Tensor | None = None) -> Tensor:
    """The other half: [n, 3, S, S] float32 where the images are.

    Args:
        images: [n, 3, S, S] uint8. parameters: [n, 16] float32, on the same device. mixing: see the operator.
    """
    return operator(
        images,
        parameters,
        _tape(images.device) if augment.erase else None,
        mixing,
        augment.mean,
        augment.std,
        augment.crop == "simple",
        augment.three_augment,
        augment.color_jitter > 0,
    )


def finish_and_blend(
    images: Tensor,
    parameters: Tensor,
    labels: Tensor,
    *,
    augment: config.Augment,
    mixup: config.Mixup,
    seed: int,
    step: int,
) -> tuple[Tensor, TwoHot]:
    """`finish`, mixed as `bigincubate.tasks.image_classification.mixup.blend` mixes a micro-batch; and the targets."""
    ratio, box = draw(mixup, images.shape, seed=seed, step=step)
    if ratio == 1.0:
        return finish(images, parameters, augment), TwoHot(labels, labels, 1.0)
    top, bottom, left, right = box or (0, 0, 0, 0)
    mixing = torch.tensor([1.0 if box else ratio, top, left, bottom, right]).to(images.device, non_blocking=True)
    return finish(images, parameters, augment, mixing), TwoHot(labels, labels.roll(len(labels) // 2, 0), ratio)


@cache
def _tape(device: torch.device) -> Tensor:
    """The same standard normal numbers everywhere."""
    return torch.randn(TAPE, generator=torch.Generator().manual_seed(0)).to(device)
