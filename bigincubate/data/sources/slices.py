"""Image files inside other files, which are read at their offset."""

from __future__ import annotations

import zlib
from typing import NamedTuple

MAX_IMAGE_BYTES = 2**30  # limit for an image inside an archive, which may claim any size
ZIP_LOCAL_HEADER = 30  # bytes before the name of a member
STORED, DEFLATED = 0, 8  # compression methods of zip files


class FileSlice(NamedTuple):
    """Bytes of a file.

    Attributes:
        file: Path of the file.
        offset: Position of the first byte.
        size: Number of bytes.
        name: What they are called, such as the name of a member of an archive.
        shown: Path to show instead of ``file``, if that is a temporary file.
    """

    file: str
    offset: int
    size: int
    name: str
    shown: str = ""

    def __str__(self) -> str:
        return f"{self.shown or self.file}/{self.name}"

    def read(self, limit: int | None = None) -> bytes:
        """Return the bytes, or only the first ``limit``.

        Raises:
            ValueError: If the file ends before the last of them, or they are too many.
        """
        check_size(self.size)
        return _read_at(self.file, self.offset, self.size if limit is None else min(limit, self.size))


class ZipSlice(NamedTuple):
    """A member of a zip file.

    Attributes:
        file: Path of the zip file.
        offset: Position of the member's local header.
        packed: Number of bytes in the zip file.
        size: Number of bytes that these unpack to.
        crc: CRC-32 of the unpacked bytes.
        method: The compression method.
        name: Name of the member.
    """

    file: str
    offset: int
    packed: int
    size: int
    crc: int
    method: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}/{self.name}"

    def read(self, limit: int | None = None) -> bytes:
        """Return the unpacked bytes, or only the first ``limit``.

        Raises:
            ValueError: If the zip file is damaged here, or the bytes are too many.
        """
        check_size(max(self.size, self.packed))
        header = _read_at(self.file, self.offset, ZIP_LOCAL_HEADER)
        if not header.startswith(b"PK\3\4"):
            raise ValueError("the zip file is damaged here: no header")
        more = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = _read_at(self.file, self.offset + ZIP_LOCAL_HEADER + more, self.packed)
        if self.method == DEFLATED:
            try:  # never unpacks more than is expected, whatever the data says
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, (limit or self.size) + 1)
            except zlib.error as error:
                raise ValueError(f"the zip file is damaged here: {error}") from None
        if limit is not None:
            return data[:limit]
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise ValueError("the zip file is damaged here: wrong size or checksum")
        return data


def check_size(size: int) -> None:
    """Refuse an image file inside another file that is too large to be read into memory at once.

    Raises:
        ValueError: If it is.
    """
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{size:,} bytes, but an image in an archive may have only {MAX_IMAGE_BYTES:,}")


def _read_at(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError("the archive ends before the end of the image")
    return data
