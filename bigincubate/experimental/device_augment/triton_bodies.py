"""Triton kernels of the augmentation. Imported only on use, because Triton is not available on every platform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

TILE = 256  # number of pixels, of four channels each

# Pixels are a tile [4, BLOCK]: red, green, blue and a zero channel, because the sizes of a tile must be powers of two.


@triton.jit
def _three(channel, red, green, blue):  # type: ignore[no-untyped-def]
    return tl.where(channel == 0, red, tl.where(channel == 1, green, tl.where(channel == 2, blue, 0.0)))


@triton.jit
def _gray(pixels, channel):  # type: ignore[no-untyped-def]
    luma = _three(channel, 0.2989959716796875, 0.587005615234375, 0.1139984130859375)  # Pillow's, over 65536
    return tl.sum(pixels * luma, 0)[None, :]


@triton.jit
def _color(  # type: ignore[no-untyped-def]
    images, parameters, blurred, gray_mean, image, offsets, size,
    REFLECT: tl.constexpr, OPERATE: tl.constexpr, JITTER: tl.constexpr,
):  # fmt: skip
    """Return pixels in 0 to 255 and their gray before contrast. operator.py defines the columns of the parameters."""
    own, plane, channel = parameters + image * 16, size * size, tl.arange(0, 4)[:, None]
    first, inside = image.to(tl.int64) * 3 * plane, (offsets < plane) & (channel < 3)
    y, x = offsets // size, offsets % size
    row = y + tl.load(own).to(tl.int32)
    column = tl.where(tl.load(own + 2) == 1, size - 1 - x, x) + tl.load(own + 1).to(tl.int32)
    if REFLECT:
        row = size - 1 - tl.abs(size - 1 - tl.abs(row))
        column = size - 1 - tl.abs(size - 1 - tl.abs(column))
    seen = inside & (row >= 0) & (row < size) & (column >= 0) & (column < size)
    pixels = tl.load(images + first + channel * plane + row * size + column, mask=seen, other=0).to(tl.float32)
    if OPERATE:
        # a tile, because Triton's interpreter cannot broadcast the result of comparing scalars
        operation = tl.load(own + 3).to(tl.int32) + tl.zeros_like(offsets)
        pixels = tl.where((operation == 1) & (pixels >= tl.load(own + 4)), 255 - pixels, pixels)
        pixels = tl.where(operation == 2, _gray(pixels, channel), pixels)
        soft = inside & (operation == 3)
        pixels = tl.where(soft, tl.load(blurred + first + channel * plane + offsets, mask=soft, other=0), pixels)
    gray_before = _gray(pixels, channel)
    if JITTER:
        for step in tl.static_range(3):
            kind, factor, gray = tl.load(own + 5 + 2 * step), tl.load(own + 6 + 2 * step), _gray(pixels, channel)
            gray_before = tl.where(kind == 1, gray, gray_before)
            towards = tl.where(kind == 2, gray, tl.where(kind == 1, gray_mean, 0.0))
            pixels = tl.minimum(tl.maximum(towards + factor * (pixels - towards), 0.0), 255.0)
    return pixels, gray_before


@triton.jit
def _gray_means(  # type: ignore[no-untyped-def]
    images, parameters, blurred, out, size, REFLECT: tl.constexpr, OPERATE: tl.constexpr, BLOCK: tl.constexpr
):
    """Store the mean gray of each image before the contrast operation."""
    image, total = tl.program_id(0), 0.0
    for start in range(0, size * size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)[None, :]
        _, gray = _color(images, parameters, blurred, 0.0, image, offsets, size, REFLECT, OPERATE, True)
        total += tl.sum(tl.where(offsets < size * size, gray, 0.0))
    tl.store(out + image, total / (size * size))


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    images, parameters, blurred, means, noise, image, offsets, size, length, mean0, mean1, mean2, std0, std1, std2,
    REFLECT: tl.constexpr, OPERATE: tl.constexpr, JITTER: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """Return pixels after color operations, normalization and erasing."""
    gray_mean = tl.load(means + image) if JITTER else 0.0
    pixels, _ = _color(images, parameters, blurred, gray_mean, image, offsets, size, REFLECT, OPERATE, JITTER)
    channel = tl.arange(0, 4)[:, None]
    pixels = (pixels - _three(channel, mean0, mean1, mean2)) / tl.where(
        channel < 3, _three(channel, std0, std1, std2), 1
    )
    if ERASE:
        own, y, x = parameters + image * 16, offsets // size, offsets % size
        erased = (y >= tl.load(own + 11)) & (x >= tl.load(own + 12)) & (y < tl.load(own + 13)) & (x < tl.load(own + 14))
        at = (tl.load(own + 15).to(tl.int32) + channel * size * size + offsets) % length
        pixels = tl.where(erased, tl.load(noise + at, mask=erased & (channel < 3), other=0), pixels)
    return pixels


@triton.jit
def _augment(  # type: ignore[no-untyped-def]
    images, parameters, blurred, means, noise, mixing, out, count, size, length, mean0, mean1, mean2, std0, std1, std2,
    REFLECT: tl.constexpr, OPERATE: tl.constexpr, JITTER: tl.constexpr, ERASE: tl.constexpr, MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, plane, channel = tl.program_id(0), size * size, tl.arange(0, 4)[:, None]
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    pixels = _finish(
        images, parameters, blurred, means, noise, image, offsets, size, length,
        mean0, mean1, mean2, std0, std1, std2, REFLECT, OPERATE, JITTER, ERASE,
    )  # fmt: skip
    if MIX:
        partner = (image + count - count // 2) % count  # same as torch.roll by half the batch
        partners = _finish(
            images, parameters, blurred, means, noise, partner, offsets, size, length,
            mean0, mean1, mean2, std0, std1, std2, REFLECT, OPERATE, JITTER, ERASE,
        )  # fmt: skip
        y, x = offsets // size, offsets % size
        pasted = (y >= tl.load(mixing + 1)) & (x >= tl.load(mixing + 2))
        pasted = pasted & (y < tl.load(mixing + 3)) & (x < tl.load(mixing + 4))
        pixels = partners + tl.where(pasted, 0.0, tl.load(mixing)) * (pixels - partners)
    at = out + image.to(tl.int64) * 3 * plane + channel * plane + offsets
    tl.store(at, pixels, mask=(offsets < plane) & (channel < 3))


def augment(
    images: Tensor,
    parameters: Tensor,
    blurred: Tensor | None,
    noise: Tensor | None,
    mixing: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    reflect: bool,
    jitter: bool,
) -> Tensor:
    """See `operator.augment`; ``blurred`` has all images, blurred, in float32, or is None without 3-Augment."""
    # tensors that are None are replaced by another tensor, which is never read
    images, parameters = images.contiguous(), parameters.contiguous()
    count, size, operate = len(images), images.shape[-1], blurred is not None
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    soft = out if blurred is None else blurred.contiguous()
    noise_pool = out if noise is None else noise
    means = torch.empty(count, dtype=torch.float32, device=images.device)
    if jitter:
        wrap_triton(_gray_means)[(count,)](images, parameters, soft, means, size, reflect, operate, TILE)
    wrap_triton(_augment)[(count, triton.cdiv(size * size, TILE))](
        images, parameters, soft, means, noise_pool, means if mixing is None else mixing, out,
        count, size, noise_pool.numel(),
        *(255 * value for value in mean), *(255 * value for value in std),
        reflect, operate, jitter, noise is not None, mixing is not None, TILE,
    )  # fmt: skip
    return out
