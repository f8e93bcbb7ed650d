"""Image transforms, composed of transforms from torchvision and timm.

Transforms use the global random generators of Python, numpy and torch, as those libraries do. `seed_rng` seeds them by
(seed, epoch, sample, view), so that the results do not depend on workers, ranks or resuming.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import RandomResizedCropAndInterpolation, auto_augment
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode, str_to_pil_interp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from ... import config

Transform = Callable[[Image.Image], Tensor]


def draws_only_from_torch(augment: config.AugmentConfig) -> bool:
    """Return whether the transform uses only torch's random generator; timm's transforms use all three generators."""
    return augment.crop != "random_resized" and not (
        augment.batch_transform or augment.rand_augment or augment.three_augment or augment.erase
    )


def train_transform(augment: config.AugmentConfig, img_size: int) -> Transform:
    """Return the transform of an RGB image to normalized [3, img_size, img_size] float32; use it after `seed_rng`."""
    steps: list[Callable] = [*image_steps(augment, img_size), ToNormalized(augment)]
    if augment.erase:
        steps.append(RandomErasing(augment.erase, mode="pixel", device="cpu"))
    return transforms.Compose(steps)


def image_steps(augment: config.AugmentConfig, img_size: int) -> list[Callable[[Image.Image], Image.Image]]:
    """Return the steps that transform an RGB image into an augmented RGB image of side ``img_size``.

    Crops: ``random_resized`` (Inception), ``simple`` (DeiT III: shorter side to ``img_size``, reflect-pad, crop),
    ``pad`` (CIFAR: the same with a black border), ``none`` (resize the whole image to a square).
    """
    steps: list[Callable] = [_crop(augment, img_size)]
    if augment.flip:
        steps.append(partial(_flip, share=augment.flip))
    if augment.rand_augment:
        policy = rand_augment_transform(augment.rand_augment, _policy_options(augment, img_size))
        for operation in policy.ops:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
        steps.append(policy)
    if augment.three_augment:  # DeiT III (arXiv 2204.07118): one of grayscale, solarization, Gaussian blur
        steps.append(auto_augment_transform("3a", _policy_options(augment, img_size)))
    if augment.color_jitter:
        steps.append(transforms.ColorJitter(*[augment.color_jitter] * 3))
    return steps


def eval_transform(augment: config.AugmentConfig, img_size: int) -> Transform:
    """Return the transform of an RGB image to its normalized center crop, [3, img_size, img_size] float32."""
    # rounded down as in timm, so that timm computes the same from an exported model
    resize = transforms.Resize(math.floor(img_size / augment.eval_crop), str_to_interp_mode(augment.interpolation))
    return transforms.Compose([resize, transforms.CenterCrop(img_size), ToNormalized(augment)])


class ToNormalized:
    """Convert an RGB image to [3, H, W] float32, (x / 255 - mean) / std.

    Args:
        augment: The augmentation settings, for mean and standard deviation.
    """

    def __init__(self, augment: config.AugmentConfig) -> None:
        self.mean = torch.tensor(augment.mean).mul(255).view(3, 1, 1)
        self.std = torch.tensor(augment.std).mul(255).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert one RGB image to [3, H, W] float32."""
        return self.all([image])[0]

    def all(self, images: Sequence[Image.Image]) -> Tensor:
        """Convert RGB images of one size to [n, 3, H, W] float32, bitwise identical to converting them one by one."""
        width, height = images[0].size
        pixels = torch.frombuffer(bytearray().join(image.tobytes() for image in images), dtype=torch.uint8)
        pixels = pixels.view(len(images), height, width, 3).permute(0, 3, 1, 2)
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.mean).div_(self.std)


def _flip(image: Image.Image, share: float) -> Image.Image:
    """Flip an image at random, as torchvision's RandomHorizontalFlip, in a third of the time for small images."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < share else image


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Call timm's posterize; return a black image for 0 bits, as old versions of Pillow do. New versions fail."""
    return auto_augment.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def _policy_options(augment: config.AugmentConfig, img_size: int) -> dict[str, Any]:
    """Return the options of timm's policies, with the values that timm's transform factory uses."""
    return {
        "translate_const": int(img_size * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in augment.mean),
        "interpolation": str_to_pil_interp(augment.interpolation),
    }


def resized_crop(augment: config.AugmentConfig, img_size: int) -> Callable[[Image.Image], Image.Image]:
    """Return the transform for the crops ``random_resized`` and ``none``."""
    if augment.crop == "none":
        return transforms.Resize((img_size, img_size), str_to_interp_mode(augment.interpolation))
    return RandomResizedCropAndInterpolation(
        img_size, scale=tuple(augment.crop_scale), interpolation=augment.interpolation
    )


def shorter_side(augment: config.AugmentConfig, img_size: int) -> Callable[[Image.Image], Image.Image]:
    """Return the first step of the crops ``simple`` and ``pad``: resize the shorter side to ``img_size``."""
    resize = transforms.Resize(img_size, str_to_interp_mode(augment.interpolation))
    return lambda image: image if min(image.size) == img_size else resize(image)


def corner(image: Image.Image, pad: int, img_size: int) -> tuple[int, int]:
    """Draw the top and left of torchvision's RandomCrop, relative to the image without its padding."""
    across, down = (side + 2 * pad - img_size + 1 for side in image.size)  # number of positions
    if across == down == 1:
        return -pad, -pad
    if across == down:  # draws the same two numbers in one call
        top, left = torch.randint(down, (2,)).tolist()
    else:
        top, left = (int(torch.randint(places, (1,))) for places in (down, across))
    return top - pad, left - pad


def _crop(augment: config.AugmentConfig, img_size: int) -> Callable[[Image.Image], Image.Image]:
    if augment.crop in ("random_resized", "none"):
        return resized_crop(augment, img_size)
    fit, pad = shorter_side(augment, img_size), augment.pad

    def shifted(image: Image.Image) -> Image.Image:
        image = fit(image)
        top, left = corner(image, pad, img_size)
        if augment.crop == "simple" and pad:
            image, top, left = functional.pad(image, [pad], padding_mode="reflect"), top + pad, left + pad
        return image.crop((left, top, left + img_size, top + img_size))  # black outside of the image

    return shifted
