"""Augmentation: a pure function of (seed, epoch, sample, repeat), and what each policy gives."""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from bigincubate.config import AugmentConfig
from bigincubate.data.images import decode_image, encode_png
from bigincubate.data.rng import seeded_rng
from bigincubate.tasks.image_classification.augment import (
    draws_only_from_torch,
    eval_transform,
    train_transform,
)

POLICIES: list[dict[str, Any]] = [
    {},
    {"crop": "simple", "three_augment": True, "color_jitter": 0.3},
    {"crop": "pad", "erase": 1.0},
    {"rand_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "interpolation": "bilinear"},
    {"crop": "none", "color_jitter": 0.4},
]


def picture(width: int = 40, height: int = 36) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def draws() -> tuple[Any, ...]:
    return random.random(), np.random.rand(), np.random.randint(1 << 30), torch.rand(2).tolist()


def views(policy: dict[str, Any], *key: int, count: int = 8, size: int = 32) -> Tensor:
    transform, out = train_transform(AugmentConfig(**policy), size), []
    for view in range(count):
        with seeded_rng(*key, view):
            out.append(transform(picture()))
    return torch.stack(out)


# ------------------------------------------------------------------------------------------------ randomness


def test_drawn_parameters_depend_on_the_key_alone() -> None:
    def drawn(*key: int) -> tuple[Any, ...]:
        with seeded_rng(*key):
            return draws()

    first = drawn(0, 1, 2, 3)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    np.random.randn()
    assert drawn(0, 1, 2, 3) == first
    assert drawn(*np.array([0, 1, 2, 3])) == first  # ids come as numpy integers
    others = [drawn(*key) for key in [(1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4), (0, 12, 3)]]
    for a in [first, *others]:
        assert sum(a[part] == b[part] for b in [first, *others] for part in range(4)) == 4  # with itself only


@pytest.mark.parametrize("policy", POLICIES)
def test_global_generators_keep_their_state(policy: dict[str, Any]) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    views(policy, 0, 0, 0)
    with pytest.raises(ZeroDivisionError), seeded_rng(1):
        _ = draws()[0] / 0
    assert draws() == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_view_is_a_pure_function(policy: dict[str, Any]) -> None:
    first = views(policy, 0, 1, 2)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert torch.equal(views(policy, 0, 1, 2), first)
    assert not torch.equal(views(policy, 0, 2, 2), first)
    assert len({view.numpy().tobytes() for view in first}) == len(first)  # repeats differ
    assert first.shape == (8, 3, 32, 32)
    assert first.dtype == torch.float32
    assert first.is_contiguous()


@pytest.mark.parametrize("crop", ["none", "pad", "simple"])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_transforms_said_to_draw_from_torch_only_do(crop: Literal["none", "pad", "simple"], jitter: float) -> None:
    augment = AugmentConfig(crop=crop, color_jitter=jitter)
    assert draws_only_from_torch(augment)
    before = random.getstate(), str(np.random.get_state())
    train_transform(augment, 32)(picture())
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]


@pytest.mark.parametrize(
    "more", [{"rand_augment": "rand-m9"}, {"three_augment": True}, {"erase": 0.5}, {"crop": "random_resized"}]
)
def test_timm_draws_from_other_generators_too(more: dict[str, Any]) -> None:
    assert not draws_only_from_torch(AugmentConfig(**{"crop": "pad", **more}))


# ------------------------------------------------------------------------------------------------ policies


def normalized(image: Image.Image, augment: AugmentConfig) -> Tensor:
    return transforms.Normalize(augment.mean, augment.std)(transforms.ToTensor()(image))


def test_pixels_are_normalized_as_by_torchvision() -> None:
    augment = AugmentConfig(crop="none", flip=0.0)
    image = picture(32, 32)
    assert torch.allclose(train_transform(augment, 32)(image), normalized(image, augment), atol=1e-6)


def test_pad_crops_the_bordered_image() -> None:
    augment = AugmentConfig(crop="pad", pad=2, flip=0.0)
    image = picture(32, 32)
    windows = normalized(ImageOps.expand(image, 2), augment).unfold(1, 32, 1).unfold(2, 32, 1)
    places = set()
    for view in range(40):
        with seeded_rng(view):
            crop = train_transform(augment, 32)(image)
        found = (windows.permute(1, 2, 0, 3, 4) - crop).abs().amax((2, 3, 4)).lt(1e-5).nonzero().tolist()
        assert len(found) == 1
        places.add(tuple(found[0]))
    assert len(places) > 15  # of 25


def test_simple_reflects_at_the_border() -> None:
    augment = AugmentConfig(crop="simple", flip=0.0)
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    for view in range(10):
        with seeded_rng(view):
            assert train_transform(augment, 32)(white).std((1, 2)).max() < 1e-5  # a black border would show


@pytest.mark.parametrize("crop", ["pad", "simple"])
@pytest.mark.parametrize(("size", "pad"), [((32, 32), 4), ((32, 32), 0), ((45, 36), 3), ((20, 64), 40)])
def test_shifts_are_those_of_torchvision(crop: Literal["pad", "simple"], size: tuple[int, int], pad: int) -> None:
    if crop == "simple":
        pad = min(pad, 31)  # nothing to reflect beyond
    ours = AugmentConfig(crop=crop, pad=pad, flip=0.5, interpolation="bicubic", mean=[0.0] * 3, std=[1 / 255] * 3)
    theirs = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(32, pad or None, padding_mode="reflect" if crop == "simple" else "constant"),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    for view in range(12):
        with seeded_rng(view):
            expected = theirs(picture(*size))
        with seeded_rng(view):
            assert torch.equal(train_transform(ours, 32)(picture(*size)).round().byte(), expected)


def test_three_augment_is_one_of_gray_solarized_blurred() -> None:
    augment = AugmentConfig(crop="none", flip=0.0, three_augment=True, mean=[0.0] * 3, std=[1.0] * 3)
    image = picture(32, 32)
    plain = normalized(image, augment)
    solarised = normalized(ImageOps.solarize(image, 128), augment)
    kinds = []
    for view in range(60):
        with seeded_rng(view):
            seen = train_transform(augment, 32)(image)
        grey = torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
        blurred = bool(seen.std() < 0.97 * plain.std())
        kinds.append("grey" if grey else "solarised" if torch.allclose(seen, solarised, atol=1e-6) else blurred)
    assert set(kinds) <= {"grey", "solarised", True, False}
    assert all(sum(kind == wanted for kind in kinds) >= 10 for wanted in ("grey", "solarised", True))


def test_erasing_fills_a_box_with_noise() -> None:
    augment = AugmentConfig(crop="none", flip=0.0, erase=1.0)
    plain = train_transform(AugmentConfig(crop="none", flip=0.0), 32)(picture(32, 32))
    with seeded_rng(1):
        erased = train_transform(augment, 32)(picture(32, 32))
    changed = (erased != plain).any(0).nonzero()
    (top, left), (bottom, right) = changed.amin(0), changed.amax(0) + 1
    assert 0 < len(changed) == (bottom - top) * (right - left) < 32 * 32


def test_flip_mirrors_half_of_the_views() -> None:
    image = picture(32, 32)
    plain = train_transform(AugmentConfig(crop="none", flip=0.0), 32)(image)
    seen = [torch.equal(view, plain) for view in views_of(image, AugmentConfig(crop="none"), 60)]
    mirrored = [torch.equal(view, plain.flip(2)) for view in views_of(image, AugmentConfig(crop="none"), 60)]
    assert [not s for s in seen] == mirrored
    assert 15 < sum(mirrored) < 45


def views_of(image: Image.Image, augment: AugmentConfig, count: int) -> list[Tensor]:
    transform, out = train_transform(augment, 32), []
    for view in range(count):
        with seeded_rng(view):
            out.append(transform(image))
    return out


def test_evaluation_takes_the_middle() -> None:
    augment = AugmentConfig(eval_crop=0.5)
    image = picture(96, 64)
    assert torch.allclose(
        eval_transform(augment, 32)(image), normalized(image.crop((32, 16, 64, 48)), augment), atol=1e-6
    )
    assert eval_transform(AugmentConfig(), 32)(picture(17, 90)).shape == (3, 32, 32)


@settings(max_examples=200)
@example((75, 33), 32, 0.875, "bicubic")  # 32 / 0.875 = 36.57 is rounded down
@example((500, 375), 224, 0.9, "bilinear")
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)).filter(lambda size: max(size) <= 20 * min(size)),
    st.integers(1, 64),
    st.floats(0.2, 1.0),
    st.sampled_from(["bicubic", "bilinear"]),
)
def test_eval_transform_computes_the_pixels_of_timm(
    size: tuple[int, int], img_size: int, crop: float, interpolation: Literal["bicubic", "bilinear"]
) -> None:
    augment = AugmentConfig(eval_crop=crop, interpolation=interpolation, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    options: dict[str, Any] = {"crop_pct": crop, "crop_mode": "center", "interpolation": interpolation}
    options |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "is_training": False}
    ours, image = eval_transform(augment, img_size), picture(*size)
    pixels = transforms.functional.pil_to_tensor(transforms.Compose(ours.transforms[:-1])(image))  # type: ignore[attr-defined]
    assert torch.equal(pixels, create_transform((3, img_size, img_size), use_prefetcher=True, **options)(image))
    # timm normalizes either as here (its prefetcher) or after a division by 255, which rounds once more
    torch.testing.assert_close(ours(image), create_transform((3, img_size, img_size), **options)(image))


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_kind_of_file_becomes_rgb(mode: str) -> None:
    import io

    out = io.BytesIO()
    picture().convert(mode).save(out, "TIFF")
    assert decode_image(out.getvalue()).mode == "RGB"


def test_png_keeps_every_pixel() -> None:
    assert decode_image(encode_png(picture())).tobytes() == picture().tobytes()


@pytest.mark.parametrize("data", [b"", b"no image", encode_png(picture())[:200]])
def test_file_that_is_no_image_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_image(data)


def test_posterizing_to_no_bits_is_black_and_not_an_error() -> None:
    """RandAugment of magnitude 9 with noise reaches magnitude 10 for one image in a thousand."""
    transform: Any = train_transform(AugmentConfig(rand_augment="rand-m10-inc1"), 32)
    (posterize,) = (op for op in transform.transforms[2].ops if op.name == "PosterizeIncreasing")
    posterize.prob = 1.0
    assert not np.array(posterize(picture())).any()
    posterize.magnitude = 9
    assert np.array(posterize(picture())).any()
