"""Read records from the bytes that MDS stores: choose the columns, and convert them to what a record has.

An adopted data set (`adopt`) may have other names, other encodings and further columns. Its images become the bytes of
an image file, and its labels become integers, as in prepared data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .images import encode_png, to_rgb

if TYPE_CHECKING:
    from .dataset import RecordSchema

IMAGE_ENCODINGS = ("bytes", "jpeg", "png", "pil")
INTEGER_ENCODINGS = ("int", "str_int", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
NAME_ENCODING = "str"
PALETTE_MODES = ("P", "PA")


class RecordReader:
    """Reads records of a schema.

    Args:
        schema: The schema; its columns say how each column is encoded.
        stored_columns: The name that each column has in the shards. None: the same.
    """

    def __init__(self, schema: RecordSchema, stored_columns: Mapping[str, str] | None = None) -> None:
        stored = stored_columns or {name: name for name in schema.columns}
        classes = {name: number for number, name in enumerate(schema.metadata.get("classes", ()))}
        self._columns = {
            name: (stored[name], _converter(encoding, classes)) for name, encoding in schema.columns.items()
        }

    def read(
        self,
        data: bytes,
        names: Sequence[str],
        sizes: Sequence[int | None],
        only: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Return a record.

        Args:
            data: The bytes of the record.
            names: The names of the columns of its shard.
            sizes: The size in bytes of each of these columns; None where it varies.
            only: The columns to return. None: those of the schema.

        Raises:
            ValueError: If the bytes are not a record of these columns, or a value is not valid.
        """
        values, begin, head = {}, 4 * sum(not size for size in sizes), 0
        for name, fixed in zip(names, sizes, strict=True):
            size = fixed or int.from_bytes(data[head : head + 4], "little")
            head += 0 if fixed else 4
            values[name] = slice(begin, begin + size)
            begin += size
        if begin != len(data):
            raise ValueError(f"its columns take {begin} bytes, but the record has {len(data)}")
        chosen = {name: column for name, column in self._columns.items() if only is None or name in only}
        return {name: convert(data[values[stored]]) for name, (stored, convert) in chosen.items()}


def _converter(encoding: str, classes: dict[str, int]) -> Callable[[bytes], Any]:
    """Return the function that converts the stored bytes of a column."""
    if encoding in ("bytes", "jpeg", "png"):
        return bytes
    if encoding == "pil":
        return _encode_stored_pixels
    if encoding == NAME_ENCODING:
        return partial(_find_class, classes=classes)
    return partial(_decode_value, encoding=encoding)


def _decode_value(data: bytes, encoding: str) -> Any:
    from ..compat.streaming_package import mds_decode

    try:
        value = mds_decode(encoding, data)
    except Exception as error:  # the type depends on the encoding: KeyError of an array, IndexError of a number, …
        raise ValueError(f"not a value of type {encoding}: {error}") from None
    return int(value) if encoding in INTEGER_ENCODINGS else value


def _find_class(data: bytes, classes: dict[str, int]) -> int:
    name = data.decode()
    if name not in classes:
        raise ValueError(f"label {name!r} is not one of the {len(classes)} classes")
    return classes[name]


def _encode_stored_pixels(data: bytes) -> bytes:
    """Return the pixels of an image of Pillow, which were stored without a file format, as a PNG file."""
    from ..compat.streaming_package import mds_decode

    image = mds_decode("pil", data)
    if image.mode in PALETTE_MODES:
        raise ValueError(f"the encoding pil does not store the palette of images of Pillow's mode {image.mode}")
    return encode_png(to_rgb(image))
