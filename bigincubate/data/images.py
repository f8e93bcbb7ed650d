"""Labeled images: the schema of their records, and decoding and encoding of image files."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .dataset import RecordSchema

LABELLED_IMAGE = "labelled_image"
LABELLED_IMAGE_COLUMNS = {"image": "bytes", "label": "int"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
MAX_VALUES_16_BIT = 65535
RESIZE_FILTER, RESIZE_QUALITY = Image.Resampling.BICUBIC, 95  # of images that are made smaller when they are prepared
ORIENTATION = 0x0112  # the EXIF tag
# the transposition that undoes each EXIF orientation; 1 is upright
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def labelled_image_schema(classes: list[str], max_pixels: int | None = None, resize: int | None = None) -> RecordSchema:
    """Return the schema of images with one label each.

    Args:
        classes: Names of the classes; a label is an index into them.
        max_pixels: Limit on the size of an image if it is not Pillow's; stored, so that training uses it too.
        resize: The shorter side that larger images were resized to; stored with how this was done.
    """
    metadata: dict[str, Any] = {"classes": classes}
    if max_pixels is not None:
        metadata["max_pixels"] = max_pixels
    if resize is not None:
        metadata["resize"] = {
            "shorter_side": resize,
            "filter": RESIZE_FILTER.name.lower(),
            "format": "JPEG",
            "quality": RESIZE_QUALITY,
        }
    return RecordSchema(LABELLED_IMAGE, LABELLED_IMAGE_COLUMNS, metadata)


def pixel_limit(schema: RecordSchema) -> int | None:
    """Return the limit on the size of an image that the data was prepared with; None for Pillow's."""
    value = schema.metadata.get("max_pixels")
    return value if isinstance(value, int) else None


def decode_image(data: bytes, *, apply_exif: bool = False, max_pixels: int | None = None) -> Image.Image:
    """Return the first frame of an image file as an RGB image with 8 bits per channel.

    Alpha is dropped. Gray values of 16 bits are scaled from 0..65535 (12-bit TIFF: 0..4095) to 0..255, and so are
    integers of 32 bits, which must lie in 0..65535. Floating-point values are scaled from 0..1, and must lie in it.

    Args:
        data: The image file.
        apply_exif: Whether to turn the image as its EXIF orientation says. (Pillow always turns TIFF files.)
        max_pixels: Maximum number of pixels. None: Pillow's limit, 179 million.

    Raises:
        ValueError: If ``data`` is not a readable image in one of the ``FORMATS``.
    """
    try:
        image = _open(data, max_pixels)
        image.load()
        rgb = to_rgb(image)
        if apply_exif and (turn := exif_orientation(image)) in TRANSPOSITIONS:
            return rgb.transpose(TRANSPOSITIONS[turn])
        return rgb
    except UnidentifiedImageError:
        found = "the file is empty" if not data else f"not an image of the formats {', '.join(FORMATS)}"
        raise ValueError(found) from None
    except Image.DecompressionBombError:
        limit = max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(f"more than {limit:,} pixels; allow more with: data prepare --max-pixels N") from None
    except Exception as error:  # the type depends on Pillow's decoder: OSError, SyntaxError, struct.error, …
        raise ValueError(str(error) or type(error).__name__) from None


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 (upright) if there is none or it is damaged."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # the type depends on what is damaged
        return 1
    return value if value in TRANSPOSITIONS else 1


def _open(data: bytes, max_pixels: int | None) -> Image.Image:
    """Open an image without decoding its pixels, and check its size."""
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
        # a global variable, which stays changed because Pillow also checks each crop of an image
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    with warnings.catch_warnings():
        # Pillow warns from half of its limit on, but only the limit decides
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise Image.DecompressionBombError
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB with 8 bits per channel.

    Raises:
        ValueError: If its mode or the range of its values is not supported.
    """
    if image.mode == "RGB":  # convert() copies even an RGB image, which may take as long as decoding
        return image
    if image.mode == "La":  # Pillow has no direct conversion
        return image.convert("LA").convert("RGB")
    if image.mode in EIGHT_BIT_MODES:
        return image.convert("RGB")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_scale_to_8_bits(image)).convert("RGB")
    raise ValueError(f"{image.format} images of Pillow's mode {image.mode} are not supported; save it as RGB")


def _scale_to_8_bits(image: Image.Image) -> np.ndarray:
    """Return gray values of 16 bits, of 32 bits or in floating point as uint8, scaled by a fixed range."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF file
    values, white = np.asarray(image), float(MAX_VALUES_16_BIT)
    if image.mode == "F":
        white = 1.0
    elif image.mode.startswith("I;16") and tags.get(258) == (12,):  # bits per sample
        white = 4095.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # also if they are not numbers
        kind = "floating-point" if image.mode == "F" else "integer"
        raise ValueError(
            f"{kind} pixels from {low:g} to {high:g}, but only 0 to {white:g} can be read; scale them, or save the"
            " image with 8 or 16 bits per channel"
        )
    scaled = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    white_is_zero = tags.get(262) == 0  # Pillow inverts only images of 8 bits
    return 255 - scaled if white_is_zero else scaled


def encode_png(pixels: Image.Image) -> bytes:
    """Return an image as an uncompressed PNG, which is lossless, fast to read, and independent of the zlib version."""
    out = io.BytesIO()
    pixels.save(out, "PNG", compress_level=0)
    return out.getvalue()


def encode_resized(pixels: Image.Image, shorter_side: int, orientation: int = 1) -> bytes:
    """Return an RGB image as a JPEG file whose shorter side has the given number of pixels.

    Args:
        pixels: The image.
        shorter_side: The number of pixels.
        orientation: EXIF orientation to note in the file, if it is not 1.
    """
    scale = shorter_side / min(pixels.size)
    size = max(round(pixels.width * scale), 1), max(round(pixels.height * scale), 1)
    exif, out = Image.Exif(), io.BytesIO()
    if orientation != 1:
        exif[ORIENTATION] = orientation
    pixels.resize(size, RESIZE_FILTER).save(out, "JPEG", quality=RESIZE_QUALITY, exif=exif)
    return out.getvalue()
