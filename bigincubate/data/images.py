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
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy may take as long as decoding
    except Exception as error:  # what Pillow raises depends on the decoder: OSError, SyntaxError, struct.error, …
        raise ValueError(str(error) or type(error).__name__) from None


def encode(pixels: Image.Image) -> bytes:
    """PNG, uncompressed: lossless, fast to read, and the same bytes with every version of zlib."""
    out = io.BytesIO()
    pixels.save(out, "PNG", compress_level=0)
    return out.getvalue()
