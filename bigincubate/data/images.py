"""Labeled images: the schema of their records, and decoding and encoding of image files."""

from __future__ import annotations

import io

from PIL import Image

from .dataset import RecordSchema

LABELLED_IMAGE = "labelled_image"
LABELLED_IMAGE_COLUMNS = {"image": "bytes", "label": "int"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")


def labelled_image_schema(classes: list[str]) -> RecordSchema:
    """Return the schema of images with one label each; a label is an index into ``classes``."""
    return RecordSchema(LABELLED_IMAGE, LABELLED_IMAGE_COLUMNS, {"classes": classes})


def decode_image(data: bytes) -> Image.Image:
    """Return the first frame of an image file as an RGB image.

    Raises:
        ValueError: If ``data`` is not a readable image in one of the ``FORMATS``.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        # convert() copies even an RGB image, which may take as long as decoding
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # the type depends on Pillow's decoder: OSError, SyntaxError, struct.error, …
        raise ValueError(str(error) or type(error).__name__) from None


def encode_png(pixels: Image.Image) -> bytes:
    """Return an image as an uncompressed PNG, which is lossless, fast to read, and independent of the zlib version."""
    out = io.BytesIO()
    pixels.save(out, "PNG", compress_level=0)
    return out.getvalue()
