"""Bytes of an image file -> RGB."""

from __future__ import annotations

import io

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")


def decode(data: bytes) -> Image.Image:
    """The first frame as an RGB image.

    Raises:
        ValueError: not a readable image of one of the ``FORMATS``.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        if image.mode != "RGB":
            return image.convert("RGB")
        image.info.clear()  # who holds the image need not hold what its file says besides
        vars(image).pop("applist", None)
        vars(image).pop("app", None)
        return image  # not a copy
    except Exception as error:  # what Pillow raises depends on the decoder: OSError, SyntaxError, struct.error, …
        raise ValueError(str(error) or type(error).__name__) from None


def encode(pixels: Image.Image) -> bytes:
    """PNG, uncompressed: lossless, fast to read, and the same bytes with every version of zlib."""
    out = io.BytesIO()
    pixels.save(out, "PNG", compress_level=0)
    return out.getvalue()
