"""Decoding of image files: pixels of every mode, EXIF orientation, the limit on pixels, and what is refused."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from bigincubate.data.images import TRANSPOSITIONS, decode_image, exif_orientation

RAMP = np.arange(256)  # the expected gray values


def encoded(image: Image.Image, form: str = "TIFF", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def equal(image: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(other))


def ramp(dtype: str, white: float) -> Image.Image:
    """A row from black to white in steps of 1/255."""
    return Image.fromarray((RAMP * (white / 255)).round(0 if white > 1 else 9).astype(dtype)[None])


def pgm(values: np.ndarray, white: int) -> bytes:
    return f"P5 {len(values)} 1 {white}\n".encode() + values.astype(">u2").tobytes()


def tiff_with_tag(data: bytes, tag: int, value: int) -> bytes:
    """Change a SHORT tag of a little-endian TIFF file."""
    out, first = bytearray(data), int.from_bytes(data[4:8], "little")
    for entry in range(first + 2, first + 2 + 12 * int.from_bytes(data[first : first + 2], "little"), 12):
        if int.from_bytes(data[entry : entry + 2], "little") == tag:
            out[entry + 8 : entry + 10] = value.to_bytes(2, "little")
    assert out != data
    return bytes(out)


GRAYS = {
    "16-bit PNG": encoded(ramp("uint16", 65535), "PNG"),
    "16-bit TIFF": encoded(ramp("uint16", 65535)),
    "16-bit PGM": pgm(RAMP * 257, 65535),
    "12-bit PGM": pgm((RAMP * (4095 / 255)).round(), 4095),
    "32-bit integer TIFF": encoded(ramp("int32", 65535)),
    "floating-point TIFF": encoded(ramp("float32", 1.0)),
    "8-bit PNG": encoded(ramp("uint8", 255), "PNG"),
    "8-bit TIFF": encoded(ramp("uint8", 255)),
}


@pytest.mark.parametrize("kind", GRAYS)
def test_gray_ramp_of_any_depth_has_the_same_pixels(kind: str) -> None:
    image = decode_image(GRAYS[kind])
    assert image.mode == "RGB"
    assert equal(np.asarray(image)[0], np.stack([RAMP] * 3, axis=1))


def test_16_bit_tiff_whose_zero_is_white_is_inverted() -> None:
    inverted = decode_image(tiff_with_tag(GRAYS["16-bit TIFF"], 262, 0))
    assert equal(np.asarray(inverted)[0, :, 0], RAMP[::-1])


def test_big_endian_16_bit_tiff_is_read() -> None:
    image = Image.new("I;16B", (256, 1))
    image.frombytes((RAMP * 257).astype(">u2").tobytes())
    assert equal(np.asarray(decode_image(encoded(image)))[0, :, 0], RAMP)


COLORS = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("mode", "form"),
    [(mode, form) for mode in ("RGB", "RGBA") for form in ("PNG", "TIFF")]
    + [("RGB", "BMP"), ("RGB", "PPM"), ("P", "PNG"), ("P", "GIF"), ("RGBX", "TIFF")],
)
def test_color_modes_keep_their_pixels(mode: str, form: str) -> None:
    image = Image.fromarray(COLORS)
    image = image.quantize(32) if mode == "P" else image.convert(mode)
    assert equal(decode_image(encoded(image, form)), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "LAB"])
def test_other_8_bit_modes_are_neither_white_nor_black(mode: str) -> None:
    if mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip(f"Pillow {PIL.__version__} cannot read the TIFF files of this mode that it writes; 13.0 can")
    image = Image.fromarray(COLORS).convert(mode)
    decoded = np.asarray(decode_image(encoded(image)))
    assert equal(decoded, image.convert("RGB"))
    assert 50 < decoded.mean() < 200


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.array([[0.0, 812.5]], np.float32), "floating-point pixels from 0 to 812.5, but only 0 to 1 "),
        (np.array([[-1.0, 1.0]], np.float32), "floating-point pixels from -1 to 1"),
        (np.array([[0.0, np.nan]], np.float32), "floating-point pixels from nan to nan"),
        (np.array([[0, 70000]], np.int32), "integer pixels from 0 to 70000, but only 0 to 65535 "),
        (np.array([[-5, 5]], np.int32), "integer pixels from -5 to 5"),
    ],
)
def test_gray_values_without_a_known_range_are_refused_with_their_range(values: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_image(encoded(Image.fromarray(values)))


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_message_of_unreadable_data_names_no_python_object(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as fault:
        decode_image(data)
    assert "<" not in str(fault.value)
    assert " at 0x" not in str(fault.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_request_only(orientation: int) -> None:
    upright = Image.fromarray(COLORS)
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = inverse.get(orientation, TRANSPOSITIONS.get(orientation))
    stored = upright.transpose(turn) if turn is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    assert equal(decode_image(data), stored)
    assert equal(decode_image(data, apply_exif=True), upright)
    assert exif_orientation(Image.open(io.BytesIO(data))) == orientation


def test_exif_rule_of_the_recipe_holds_in_training_and_evaluation() -> None:
    from bigincubate.config import AugmentConfig
    from bigincubate.tasks.image_classification.views import EvalTransform, TrainTransform

    exif = Image.Exif()
    exif[0x0112] = 6
    record = {"image": encoded(Image.fromarray(COLORS), "PNG", exif=exif), "label": 0}
    for rule, shape in (("ignore", (5, 4)), ("apply", (4, 5))):
        augment = AugmentConfig.model_validate({"exif": rule})
        for transform in (TrainTransform(augment, 8, seed=0, classes=1), EvalTransform(augment, 8, classes=1)):
            assert transform.decode(record)[0].size == shape
    assert AugmentConfig().exif == "ignore"


def test_damaged_exif_is_upright() -> None:
    data = encoded(Image.fromarray(COLORS), "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert equal(decode_image(data, apply_exif=True), COLORS)


@pytest.mark.parametrize(("limit", "accepted"), [(None, True), (20, True), (19, False)])
def test_only_the_limit_on_pixels_decides_and_nothing_is_warned_of(
    limit: int | None, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.fromarray(COLORS), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)  # Pillow warns of images above it, such as this one of 20
    refused: Any = contextlib.nullcontext() if accepted else pytest.raises(ValueError, match="more than 19 pixels")
    with warnings.catch_warnings(record=True) as warned, refused:
        warnings.simplefilter("always")
        decode_image(data, max_pixels=limit)
    assert warned == []


def test_limit_on_pixels_is_named_and_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(COLORS), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    with pytest.raises(ValueError, match=r"more than 18 pixels; .*--max-pixels N"):
        decode_image(data)
    assert equal(decode_image(data, max_pixels=20), COLORS)
    with pytest.raises(ValueError, match=r"more than 19 pixels"):
        decode_image(data, max_pixels=19)
    assert decode_image(data, max_pixels=20).crop((0, 0, 5, 4)).size == (5, 4)  # which Pillow checks too
