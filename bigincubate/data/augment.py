"""What happens to an image: parts of torchvision and timm, and randomness that is a pure function.

A transform draws from the global generators of `random`, numpy and torch, as those libraries do. `seeded` makes what
they draw a function of (seed, epoch, sample, repeat), so that workers, ranks and resumes change nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import RandomResizedCropAndInterpolation, auto_augment
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode, str_to_pil_interp
from torch import Tensor
from torchvision import transforms

from .. import config

Transform = Callable[[Image.Image], Tensor]
_GENERATOR = np.random.MT19937()  # takes the place of numpy's global one inside `seeded`


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Inside, the global generators of `random`, numpy and torch (CPU) start from ``key`` and from nothing else.

    Afterwards they are as before (but for the one Gaussian that numpy's may have kept). Not to be nested.
    """
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8).digest()
    word = int.from_bytes(digest, "little")
    ours, numpys, torchs = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    try:
        random.seed(word)
        np.random.set_bit_generator(_GENERATOR)  # a swap: copying numpy's state takes 30 times as long
        np.random.seed(word & 0xFFFFFFFF)
        torch.default_generator.manual_seed(word)
        yield
    finally:
        random.setstate(ours)
        np.random.set_bit_generator(numpys)
        torch.set_rng_state(torchs)


def train_transform(augment: config.Augment, img_size: int) -> Transform:
    """RGB image -> [3, img_size, img_size] float32, normalised. Random: call it inside `seeded`.

    Crops: ``random_resized`` (Inception), ``simple`` (DeiT III: shorter side to ``img_size``, reflect-pad, crop),
    ``pad`` (CIFAR: the same with a black border), ``none`` (the whole image, squeezed).
    """
    steps: list[Callable] = [_crop(augment, img_size)]
    if augment.flip:
        steps.append(transforms.RandomHorizontalFlip(augment.flip))
    if augment.rand_augment:
        policy = rand_augment_transform(augment.rand_augment, _colours_and_sizes(augment, img_size))
        for operation in policy.ops:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
        steps.append(policy)
    if augment.three_augment:  # DeiT III (arXiv 2204.07118): one of greyscale, solarisation, Gaussian blur
        steps.append(auto_augment_transform("3a", _colours_and_sizes(augment, img_size)))
    if augment.color_jitter:
        steps.append(transforms.ColorJitter(*[augment.color_jitter] * 3))
    steps.append(ToNormalized(augment.mean, augment.std))
    if augment.erase:
        steps.append(RandomErasing(augment.erase, mode="pixel", device="cpu"))
    return transforms.Compose(steps)


def eval_transform(augment: config.Augment, img_size: int) -> Transform:
    """RGB image -> [3, img_size, img_size] float32, normalised: the middle of the image, nothing random."""
    return transforms.Compose(
        [
            transforms.Resize(round(img_size / augment.eval_crop), str_to_interp_mode(augment.interpolation)),
            transforms.CenterCrop(img_size),
            ToNormalized(augment.mean, augment.std),
        ]
    )


class ToNormalized:
    """RGB image -> [3, H, W] float32, (x / 255 - mean) / std."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean = torch.tensor(mean).mul(255).view(3, 1, 1)
        self.std = torch.tensor(std).mul(255).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.mean).div_(self.std)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's. At full magnitude it keeps no bit, for which old versions of Pillow gave black, and new ones an error."""
    return auto_augment.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def _colours_and_sizes(augment: config.Augment, img_size: int) -> dict[str, Any]:
    """What timm's policies want to know, as timm's own factory of transforms gives it to them."""
    return {
        "translate_const": int(img_size * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in augment.mean),
        "interpolation": str_to_pil_interp(augment.interpolation),
    }


def resized_crop(augment: config.Augment, img_size: int) -> Callable[[Image.Image], Image.Image]:
    """A part of the image, or all of it, at another size: crops ``random_resized`` and ``none``."""
    if augment.crop == "none":
        return transforms.Resize((img_size, img_size), str_to_interp_mode(augment.interpolation))
    return RandomResizedCropAndInterpolation(
        img_size, scale=tuple(augment.crop_scale), interpolation=augment.interpolation
    )


def shorter_side(augment: config.Augment, img_size: int) -> Callable[[Image.Image], Image.Image]:
    """The whole image at another size, as crops ``simple`` and ``pad`` begin."""
    return transforms.Resize(img_size, str_to_interp_mode(augment.interpolation))


def _crop(augment: config.Augment, img_size: int) -> Callable[[Image.Image], Image.Image]:
    if augment.crop in ("random_resized", "none"):
        return resized_crop(augment, img_size)
    border = "reflect" if augment.crop == "simple" else "constant"
    shifted = transforms.RandomCrop(img_size, padding=augment.pad or None, padding_mode=border)
    return transforms.Compose([shorter_side(augment, img_size), shifted])
