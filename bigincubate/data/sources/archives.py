"""List the members of tar and zip files: names, sizes and offsets, without reading the contents.

An archive may come from anywhere. Names that lead outside of it, names that occur twice, and an archive without a
proper end are refused; links, devices and pipes are counted and skipped.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ...errors import DataError
from ...files import quote_path
from ..samples import StoredImage
from .slices import DEFLATED, STORED, FileSlice, ZipSlice
from .tar_headers import BLOCK, SeekableFile, is_tar_header, read_tar_headers

# first bytes of compressed files, and the class that reads them
COMPRESSIONS: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", gzip.GzipFile),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\0", lzma.LZMAFile),
)
MAX_NAME_BYTES, MAX_NAME_FOLDERS = 4096, 200
LINKS, DEVICES, SPARSE = "links in the archive", "pipes, sockets and devices", "sparse files in the archive"
# what the parsers raise for archives that are damaged, perhaps on purpose; NotImplementedError is raised by zipfile for
# entries of an unknown compression
DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error),
    *(ValueError, OverflowError, RecursionError, NotImplementedError, MemoryError, gzip.BadGzipFile),
)


class Member(NamedTuple):
    """A regular file in an archive.

    Attributes:
        name: Its name: relative, with slashes, without ``.`` and ``..``.
        size: Its size in bytes.
        stored: Where its bytes are.
    """

    name: str
    size: int
    stored: StoredImage


@dataclass
class Archive:
    """What an archive contains.

    Attributes:
        file: Its absolute path.
        form: ``tar`` or ``zip``.
        members: Its regular files, in the order in which they are stored.
        skipped: Number of other members by reason.
        compressed: Whether the whole archive is compressed, so that the offsets are those in the unpacked archive.
        modified: Its modification time in nanoseconds.
    """

    file: Path
    form: str
    members: list[Member] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    compressed: bool = False
    modified: int = 0


def list_archive(path: Path) -> Archive | None:
    """List the members of a tar or zip file; None if the file is something else.

    Raises:
        DataError: If it is damaged or refused.
    """
    file = Path(os.path.abspath(path))
    opener = _decompressor(file)
    try:
        if opener is None and not _is_tar(file):
            return _list_zip(file)
        archive = Archive(file, "tar", compressed=opener is not None, modified=file.stat().st_mtime_ns)
        with opener(file) if opener else file.open("rb") as data:
            if opener and not is_tar_header(data.read(BLOCK)):
                return None
            archive.members = list_tar(data, file, archive.skipped)
            while opener and data.read(BLOCK * 2048):
                pass  # the checksum of a compressed file is at its end
    except DAMAGED as error:
        raise damaged_archive(file, str(error) or type(error).__name__) from None
    _refuse_duplicates(archive)
    return archive


def damaged_archive(file: Path | str, why: str) -> DataError:
    """Return the error for an archive that is damaged or truncated."""
    first = (why.splitlines() or [""])[0].rstrip(": ")  # Python's parsers list what they tried in further lines
    return DataError(f"{quote_path(file)} is damaged: {first}; copy or download it again")


def list_tar(data: SeekableFile, file: Path, skipped: Counter[str], start: int = 0, within: str = "") -> list[Member]:
    """Return the regular files of a tar file.

    Args:
        data: The tar file, at its first byte; a window of a file if it is inside another tar file.
        file: Path of the file that holds it.
        skipped: Counts other members by reason.
        start: Position in the file at which ``data`` begins.
        within: Name of the tar file inside ``file``, with a slash at the end.

    Raises:
        DataError: If a name is refused.
        ValueError: If it is damaged or truncated.
    """
    members, path = [], str(file)
    for member in read_tar_headers(data):
        info = member.info
        if info.isdir():
            continue
        name = clean_name(member.name, file)
        if info.issym() or info.islnk():
            skipped[LINKS] += 1
        elif member.sparse:
            skipped[SPARSE] += 1
        elif not info.isreg():
            skipped[DEVICES] += 1
        else:
            place = FileSlice(path, start + member.offset, member.size, within + name)
            members.append(Member(name, member.size, place))
    return members


def clean_name(name: str, file: Path) -> str:
    """Return the name of a member without empty parts and ``.``.

    Raises:
        DataError: If it leads outside of the archive, or is too long.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    shown = repr(name if len(name) <= 200 else f"{name[:200]}…")
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:[\\/]", name) or "\0" in name or not parts:
        raise DataError(f"{quote_path(file)} is refused: the name {shown} leads outside of the archive; make it again")
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES or len(parts) > MAX_NAME_FOLDERS:
        raise DataError(f"{quote_path(file)} is refused: the name {shown} is too long; make it again")
    return "/".join(parts)


def open_compressed(file: Path) -> IO[bytes]:
    """Open a compressed file, to read what it unpacks to.

    Raises:
        ValueError: If it is not compressed.
    """
    if (opener := _decompressor(file)) is None:
        raise ValueError("it is no longer compressed")
    return cast("IO[bytes]", opener(file))


class Window:
    """A part of a file, read as if it were a file.

    Args:
        file: The file.
        start: Position of the first byte.
        size: Number of bytes.
    """

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, offset: int, /) -> int:
        """Move to a position."""
        self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes."""
        self._file.seek(self._start + self._at)
        data = self._file.read(max(min(size, self._size - self._at), 0))
        self._at += len(data)
        return data


def _decompressor(file: Path) -> Callable[[Path], Any] | None:
    """Return the function that opens a compressed file; None if the file is not compressed."""
    with file.open("rb") as data:
        head = data.read(6)
    return next((opener for magic, opener in COMPRESSIONS if head.startswith(magic)), None)


def _is_tar(file: Path) -> bool:
    with file.open("rb") as data:
        return is_tar_header(data.read(BLOCK))


def _list_zip(file: Path) -> Archive | None:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as data:
            if data.read(4) == b"PK\3\4":
                raise ValueError("a zip file without an end; it may be truncated")
        return None
    size, archive = file.stat().st_size, Archive(file, "zip", modified=file.stat().st_mtime_ns)
    with zipfile.ZipFile(file) as opened:
        infos = sorted(opened.infolist(), key=lambda info: info.header_offset)
    end = 0
    for info in infos:
        if info.header_offset < end or info.compress_size < 0:
            raise DataError(f"{quote_path(file)} is refused: its members overlap; make it again")
        end = info.header_offset + 30 + info.compress_size
        if info.filename.endswith("/"):  # a folder
            continue
        name, kind = clean_name(info.filename, file), stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            archive.skipped[LINKS if kind == stat.S_IFLNK else DEVICES] += 1
            continue
        if info.flag_bits & 1:
            raise DataError(f"{quote_path(file)} is encrypted; make it without a password")
        if info.compress_type not in (STORED, DEFLATED):
            raise DataError(f"{quote_path(file)}: {name!r} is neither stored nor deflated; make the zip file again")
        place = ZipSlice(
            *(str(file), info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type, name)
        )
        archive.members.append(Member(name, info.file_size, place))
    if end > size:
        raise ValueError("it ends before its last member")
    _refuse_duplicates(archive)
    return archive


def _refuse_duplicates(archive: Archive) -> None:
    """Refuse two members with the same name: programs differ in which of them they unpack."""
    seen: set[str] = set()
    for member in archive.members:
        if member.name in seen:
            raise DataError(f"{quote_path(archive.file)} is refused: it holds {member.name!r} twice; make it again")
        seen.add(member.name)
