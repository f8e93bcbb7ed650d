"""Augment a batch on the device.

The inputs are uint8 images and one row of parameters per image; the outputs are normalized and mixed float32 images.
This takes one pass over memory. Two things are computed before it: the blur (products with a banded matrix, for all
images, because finding those that need it would make the host wait), and the mean gray for contrast.

The operations are those of Pillow, but without rounding to integers after each of them: ``ImageOps.solarize``,
``ImageFilter.GaussianBlur`` (three box blurs), ``ImageEnhance`` with factors. Their order is: crop, flip, 3-Augment
(Touvron et al., DeiT III, 2022, arXiv:2204.07118), color jitter, normalization, random erasing (Zhong et al., 2017,
arXiv:1708.04896), mixup or CutMix. The operator has no backward pass, because images need no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.launch import use_triton

# columns of a row of parameters; the Triton body uses the same numbers
DOWN, RIGHT = 0, 1  # top and left of the crop in the image, in pixels; pixels outside the image are border
FLIP = 2  # 1: flip horizontally
OPERATION, AMOUNT = 3, 4  # operation of 3-Augment, and its threshold or its sigma in pixels
JITTER = 5  # columns 5 to 10: three pairs of a color jitter operation and its factor, in order
BOX = 11  # columns 11 to 14: the erased box (top, left, bottom, right); all zero if there is none
NOISE = 15  # start index of the image's noise in `noise`
COLUMNS = 16

SOLARIZE, GRAYSCALE, BLUR = 1, 2, 3
BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's weights of red, green and blue in gray (ITU-R 601)
REACH = 2  # pixels that a box blur reads on each side, for sigma up to 2


@torch.library.triton_op("bigincubate::augment", mutates_args={})
def augment(
    images: Tensor,
    parameters: Tensor,
    noise: Tensor | None,
    mixing: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    reflect: bool,
    three_augment: bool,
    jitter: bool,
) -> Tensor:
    """Return normalized and mixed images ``[n, 3, S, S]`` float32 (float64 for float64 parameters, as a reference).

    Args:
        images: ``[n, 3, S, S]`` uint8.
        parameters: ``[n, 16]``, with the columns defined above.
        noise: ``[length]`` standard normal numbers. An erased image uses 3 S S of them from its start index, wrapping
            around at the end. None if nothing is erased.
        mixing: ``[5]``: the weight of the image itself, and a box (top, left, bottom, right) in which its partner, n/2
            rows away, has weight 1. None if images are not mixed.
        mean: Mean of red, green and blue, in [0, 1].
        std: Standard deviation of red, green and blue, in units of the full range.
        reflect: Whether the border reflects the image, by at most S - 1 pixels; otherwise it is black.
        three_augment: Whether any row has an operation of 3-Augment.
        jitter: Whether any row has color jitter factors.
    """
    if not use_triton(images):
        return _eager(images, parameters, noise, mixing, mean, std, reflect, three_augment, jitter)
    from . import triton_bodies

    blurred = blur(windows(images, parameters, reflect), parameters) if three_augment else None
    return triton_bodies.augment(images, parameters, blurred, noise, mixing, mean, std, reflect, jitter)


def _eager(
    images: Tensor,
    parameters: Tensor,
    noise: Tensor | None,
    mixing: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    reflect: bool,
    three_augment: bool,
    jitter: bool,
) -> Tensor:
    x = windows(images, parameters, reflect)
    if three_augment:
        operation, soft = _column(parameters, OPERATION), blur(x, parameters)
        x = torch.where((operation == SOLARIZE) & (x >= _column(parameters, AMOUNT)), 255 - x, x)
        x = torch.where(operation == GRAYSCALE, _gray(x), torch.where(operation == BLUR, soft, x))
    for step in range(3 if jitter else 0):
        kind, factor = _column(parameters, JITTER + 2 * step), _column(parameters, JITTER + 2 * step + 1)
        gray = _gray(x)
        towards = gray * (kind == SATURATION) + gray.mean((2, 3), keepdim=True) * (kind == CONTRAST)
        x = torch.lerp(towards, x, factor).clamp(0, 255)
    x = (x - 255 * x.new_tensor(mean).view(3, 1, 1)) / (255 * x.new_tensor(std).view(3, 1, 1))
    if noise is not None:
        at = parameters[:, NOISE, None].long() + torch.arange(x[0].numel(), device=x.device)
        drawn = noise.to(x.dtype)[at % len(noise)].view(x.shape)
        x = torch.where(_inside(x, *parameters[:, BOX : BOX + 4].unbind(1)), drawn, x)
    if mixing is not None:
        share, *box = mixing.to(x.dtype).unbind()
        partners = x.roll(len(x) // 2, 0)
        x = torch.where(_inside(x, *(edge[None] for edge in box)), partners, partners + share * (x - partners))
    return x


def windows(images: Tensor, parameters: Tensor, reflect: bool) -> Tensor:
    """Return the cropped and flipped images, ``[n, 3, S, S]`` in 0 to 255, in the dtype of ``parameters``."""
    size = images.shape[-1]
    at = torch.arange(size, device=images.device)
    down, right, flip = parameters[:, [DOWN, RIGHT, FLIP]].long().unsqueeze(2).unbind(1)
    rows, columns = at + down, torch.where(flip == 1, size - 1 - at, at) + right
    if reflect:
        rows, columns = (size - 1 - (size - 1 - place.abs()).abs() for place in (rows, columns))
    seen = [(place >= 0) & (place < size) for place in (rows, columns)]
    rows, columns = (place.clamp(0, size - 1) for place in (rows, columns))
    index = (rows[:, :, None] * size + columns[:, None, :]).flatten(1)[:, None].expand(-1, 3, -1)
    found = images.flatten(2).gather(2, index).view(images.shape).to(parameters.dtype)
    return found * (seen[0][:, :, None] & seen[1][:, None, :])[:, None]


def blur(x: Tensor, parameters: Tensor) -> Tensor:
    """Blur ``x``, ``[b, 3, S, S]``, as Pillow does: with three boxes of fractional width per direction.

    Edge pixels are repeated outside of the image. Source: Gwosdek et al., extended box filtering, SSVM 2011.
    """
    size = x.shape[-1]
    variance = parameters[:, AMOUNT, None, None] ** 2 / 3  # of one box
    full = ((12 * variance + 1).sqrt() - 1).div(2).floor()  # number of pixels on each side with weight 1
    part = (2 * full + 1) * (full * (full + 1) - 3 * variance) / (6 * (variance - (full + 1) ** 2))  # next pixel's
    at = torch.arange(size, device=x.device)
    beyond = torch.arange(-REACH, size + REACH, device=x.device)
    distance = (at[:, None] - beyond).abs()
    weights = ((distance <= full) + part * (distance == full + 1)) / (2 * (full + part) + 1)
    box = weights.new_zeros(len(x), size, size).index_add(2, beyond.clamp(0, size - 1), weights)
    thrice = (box @ box @ box)[:, None]
    return thrice @ x @ thrice.mT


def _column(parameters: Tensor, index: int) -> Tensor:
    return parameters[:, index, None, None, None]


def _gray(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _inside(x: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """Return a mask of the pixels in each image's box, or in one box for all images: ``[n or 1, 1, S, S]``."""
    at = torch.arange(x.shape[-1], device=x.device)
    rows = (at >= top[:, None]) & (at < bottom[:, None])
    columns = (at >= left[:, None]) & (at < right[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]
