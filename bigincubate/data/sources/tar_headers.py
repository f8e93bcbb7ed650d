"""Read the headers of a tar file.

Python's ``tarfile`` takes a damaged header for the end of the archive, and keeps every header in memory. This reader
refuses damaged headers, and yields the headers one by one. It knows the formats of POSIX (ustar, pax) and of GNU tar.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from tarfile import TarInfo
from typing import NamedTuple, Protocol

BLOCK = 512  # bytes; headers and contents are padded to it
MAX_HEADER_BYTES = 2**20  # limit for an extended header, which may claim any size
MAX_MEMBER_BYTES = 2**43  # file systems refuse to seek too far beyond the end of a file
NO_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
EXTENDED, GLOBAL, LONG_NAME, LONG_LINK, SPARSE = b"x", b"g", b"L", b"K", b"S"  # types of headers


class SeekableFile(Protocol):
    """What is read: a file, a part of a file, or an unpacked view of a compressed file."""

    def seek(self, offset: int, /) -> int:
        """Move to a position."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes."""


class TarMember(NamedTuple):
    """A member of a tar file.

    Attributes:
        name: Its name, as it is stored.
        info: Its header. ``name`` and the size given here may replace those in the header.
        offset: Position of its content.
        size: Size of its content in bytes.
        sparse: Whether the holes of its content are left out.
    """

    name: str
    info: TarInfo
    offset: int
    size: int
    sparse: bool


def is_tar_header(block: bytes) -> bool:
    """Return whether a block is a header, by its checksum, or the end of an archive, which may be empty."""
    if block == bytes(BLOCK):
        return True
    try:
        TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def read_tar_headers(file: SeekableFile) -> Iterator[TarMember]:
    """Yield the members of a tar file.

    Raises:
        ValueError: If a header is damaged, or the file ends before the end of the archive.
    """
    position, more = 0, dict[str, str]()  # values of an extended header, which belong to the next one
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            return
        if len(block) < BLOCK:
            raise ValueError("it ends without the mark of its end; it may be truncated")
        try:
            info = TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise ValueError(f"{error} (header at byte {position:,})") from None
        position += BLOCK
        if info.type in (EXTENDED, GLOBAL, LONG_NAME, LONG_LINK):
            content = _read_extended(file, info, position)
            position += _padded(info.size)
            if info.type == EXTENDED:
                more |= _parse_pax(content)
            elif info.type == LONG_NAME:
                more["path"] = content.split(b"\0")[0].decode("utf-8", "surrogateescape")
            continue
        if info.type == SPARSE:
            position = _skip_sparse_map(file, block, position)
        size = _parse_size(more["size"]) if "size" in more else info.size
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise ValueError(f"an impossible size in the header before byte {position:,}")
        size = 0 if info.type in NO_CONTENT else size
        sparse = info.type == SPARSE or any(key.startswith("GNU.sparse.") for key in more)
        yield TarMember(more.get("GNU.sparse.name") or more.get("path") or info.name, info, position, size, sparse)
        position, more = position + _padded(size), {}


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read_extended(file: SeekableFile, info: TarInfo, position: int) -> bytes:
    if not 0 <= info.size <= MAX_HEADER_BYTES:
        raise ValueError(f"an extended header of {info.size:,} bytes")
    file.seek(position)
    content = file.read(info.size)
    if len(content) < info.size:
        raise ValueError("it ends in a header; it may be truncated")
    return content


def _parse_pax(content: bytes) -> dict[str, str]:
    """Return the records of a pax header, each ``LENGTH KEY=VALUE`` and a newline."""
    found, at = {}, 0
    while at < len(content) and content[at]:
        length, space, _ = content[at : at + 20].partition(b" ")
        size = _parse_size(length.decode("ascii", "replace"))
        key, equals, value = content[at + len(length) + 1 : at + size - 1].partition(b"=")
        if not space or not equals or content[at + size - 1 : at + size] != b"\n":
            raise ValueError("a damaged extended header")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += size
    return found


def _parse_size(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError("a damaged extended header")
    return int(text)


def _skip_sparse_map(file: SeekableFile, block: bytes, position: int) -> int:
    """Return where the content of a sparse file of the old GNU format begins, after further blocks of its map."""
    extended = block[482]
    while extended:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ValueError("it ends in a header; it may be truncated")
        extended, position = block[504], position + BLOCK
    return position
