"""Find the image files of a source: those in folders of a file system, and what any source skips."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from ...errors import DataError, SystemResourceError, format_count
from ...files import MISSING_OR_WRONG_TYPE, unreadable_error
from ..samples import StoredImage

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
# the first bytes of image files; those of BMP and PPM are too short to tell them from text
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# folders that are skipped, in addition to hidden ones; file systems and photo software create them
SKIPPED_FOLDERS = ("@eadir", "__macosx", "__pycache__", "lost+found", "$recycle.bin", "thumbnails")
CONVERT, UNPACK, EXTRACT = "convert them to PNG or JPEG", "unpack them", "write their images as files"
ALONE = "prepare the file itself"
UNREAD_FORMATS = {  # formats that hold images but are not read, and what to do
    **dict.fromkeys(
        (".avif", ".heic", ".heif", ".jxl", ".jp2", ".dcm", ".svg", ".ico", ".psd", ".exr", ".npy"), CONVERT
    ),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".parquet", ".arrow", ".npz"), ALONE),
    **dict.fromkeys((".bz2", ".xz", ".7z", ".rar"), UNPACK),
    **dict.fromkeys((".tfrecord", ".h5", ".hdf5", ".lmdb", ".mdb", ".rec"), EXTRACT),
    **dict.fromkeys((".mds", ".pkl", ".pickle", ".mat"), EXTRACT),
}
Key = TypeVar("Key", bound=Hashable)


class ImageFile(NamedTuple):
    """A file to read.

    Attributes:
        path: Its path; for a member of an archive, the path of the archive and its name in the archive.
        stamp: Its size in bytes and modification time in nanoseconds; (-1, -1) for a broken link.
        stored: Where its bytes are, if the path is not that of a file.
    """

    path: str
    stamp: tuple[int, int]
    stored: StoredImage | None = None


class ImageFinder(ABC):
    """Finds images in a tree of folders and counts what it skips.

    Attributes:
        skipped: Number of skipped files by reason.
        linked: For each skipped link: its path and the path of what was counted instead.
    """

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.linked: list[tuple[str, str]] = []

    @abstractmethod
    def subfolders(self, folder: Path) -> dict[str, Path]:
        """Return the folders in ``folder`` that may hold images, sorted by name."""

    @abstractmethod
    def find(self, folders: Mapping[Key, Path]) -> dict[Key, list[ImageFile]]:
        """Return the image files below each folder, sorted by path."""

    @abstractmethod
    def count_skipped(self, folder: Path) -> None:
        """Count what lies in ``folder`` but in none of its folders that may hold images."""

    @abstractmethod
    def files_in(self, folder: Path) -> list[str]:
        """Return the paths of the files in ``folder``, without those in its folders."""

    @abstractmethod
    def walk(self, folder: Path) -> Iterator[str]:
        """Yield the paths of all files below ``folder`` that are not hidden."""

    @abstractmethod
    def is_image(self, path: str) -> bool:
        """Return whether a file is an image by its suffix, or by its first bytes if its suffix is another."""

    def holds_images(self, folder: Path) -> bool:
        """Return whether there is an image anywhere below ``folder``."""
        return any(self.is_image(path) for path in self.walk(folder))


class FolderFinder(ImageFinder):
    """Finds images in folders. Each real folder and each real file counts once, however many links lead to it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[int, int], str] = {}  # device and inode -> path
        self._links: deque[tuple[Hashable, str]] = deque()

    def subfolders(self, folder: Path) -> dict[str, Path]:
        """Return the folders in ``folder`` that may hold images, sorted by name."""
        entries = (entry for entry in sorted(folder.iterdir()) if entry.is_dir())
        return {entry.name: entry for entry in entries if not is_skipped_folder(entry.name)}

    def find(self, folders: Mapping[Key, Path]) -> dict[Key, list[ImageFile]]:
        """Return the image files below each folder, sorted by path.

        Files in real folders come first: a link is followed only if what it leads to has not been found otherwise.
        """
        found: dict[Key, list[ImageFile]] = {key: [] for key in folders}
        for key, folder in folders.items():
            if folder.is_symlink():
                self._links.append((key, str(folder)))
            else:
                self._walk(key, str(folder), found)
        while self._links:
            key, link = self._links.popleft()  # type: ignore[assignment]
            if os.path.isdir(link):
                self._walk(key, link, found)
            else:
                self._add_file(key, link, found)
        return {key: sorted(files) for key, files in found.items()}

    def count_skipped(self, folder: Path) -> None:
        """Count what lies in ``folder`` but in none of its folders that may hold images."""
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if _is_folder(entry):
                if is_skipped_folder(entry.name):
                    self._skip_folder(entry.path)
            else:
                self.skipped[_reason_outside_of_classes(entry)] += 1

    def files_in(self, folder: Path) -> list[str]:
        """Return the paths of the files in ``folder``, without those in its folders."""
        return [str(entry) for entry in sorted(folder.iterdir()) if entry.is_file()]

    def walk(self, folder: Path) -> Iterator[str]:
        """Yield the paths of all files below ``folder`` that are not hidden; links to folders are not followed."""
        return walk_files(folder)

    def is_image(self, path: str) -> bool:
        """Return whether a file is an image by its suffix, or by its first bytes if its suffix is another."""
        return is_image_file(path)

    def _walk(self, key: Key, folder: str, found: dict[Key, list[ImageFile]]) -> None:
        if self._is_known(folder, os.stat(folder)):
            return
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if is_skipped_folder(entry.name) and _is_folder(entry):
                self._skip_folder(entry.path)
            elif entry.name.startswith("."):
                self.skipped["hidden files"] += 1
            elif entry.is_symlink():
                self._links.append((key, entry.path))
            elif entry.is_dir():
                self._walk(key, entry.path, found)
            else:
                self._add_file(key, entry.path, found)

    def _add_file(self, key: Key, path: str, found: dict[Key, list[ImageFile]]) -> None:
        try:
            status = os.stat(path)
        except OSError:
            status = None
        if status and not stat.S_ISREG(status.st_mode):
            self.skipped["pipes, sockets and devices"] += 1
        elif not _may_be_image(path):
            self.skipped[skip_reason(path)] += 1
        elif status is None:
            found[key].append(ImageFile(path, (-1, -1)))  # cannot be read, which is reported later
        elif not self._is_known(path, status):
            found[key].append(ImageFile(path, (status.st_size, status.st_mtime_ns)))

    def _is_known(self, path: str, status: os.stat_result) -> bool:
        """Return whether another path led to this folder or file before."""
        identity = (status.st_dev, status.st_ino)
        if status.st_ino and identity in self._seen:  # some network file systems have no inodes
            self.skipped["links to what is counted already"] += 1
            self.linked.append((path, self._seen[identity]))
            return True
        self._seen[identity] = path
        return False

    def _skip_folder(self, folder: str) -> None:
        count = sum(len(names) for _, _, names in os.walk(folder))
        self.skipped[f"in folders {os.path.basename(folder)}"] += count


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; ``is_dir`` raises an error for a link to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_skipped_folder(name: str) -> bool:
    """Return whether a folder is hidden, or holds thumbnails or files of the system."""
    return name.startswith(".") or name.lower() in SKIPPED_FOLDERS


def has_image_suffix(path: str) -> bool:
    """Return whether the name of a file ends as those of images do."""
    return path.lower().endswith(SUFFIXES)


def has_image_signature(head: bytes) -> bool:
    """Return whether the first 12 bytes of a file are those of an image."""
    return head.startswith(SIGNATURES) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def is_image_file(path: str) -> bool:
    """Return whether a file is an image by its suffix, or by its first bytes if the suffix is not that of an image.

    Raises:
        SystemResourceError: It has no suffix, and its first bytes cannot be read, so it may be one.
    """
    if has_image_suffix(path):
        return True
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe may never end
            return False
        with open(path, "rb") as file:
            return has_image_signature(file.read(12))
    except OSError as error:
        if os.path.splitext(path)[1] or error.errno in MISSING_OR_WRONG_TYPE:
            return False
        raise unreadable_error(error, Path(path), DataError) from None


def _may_be_image(path: str) -> bool:
    """Return whether a file is an image, or may be one but cannot be read, which is reported when it is prepared."""
    try:
        return is_image_file(path)
    except SystemResourceError:
        return True


def _reason_outside_of_classes(entry: os.DirEntry[str]) -> str:
    """Return why a file that is in no folder of a class is skipped."""
    try:
        is_image = not entry.name.startswith(".") and is_image_file(entry.path)
    except SystemResourceError:
        return "files that cannot be read"
    return "images outside of the class folders" if is_image else skip_reason(entry.name)


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files that are not hidden, below ``folder``; links to folders are not followed.

    Raises:
        SystemResourceError: If a folder cannot be read. Its files must not be left out without a word.
    """

    def refuse(error: OSError) -> NoReturn:
        raise unreadable_error(error, folder, DataError)

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not is_skipped_folder(name))
        yield from (os.path.join(where, name) for name in sorted(names) if not name.startswith("."))


def describe_files(paths: Iterable[str]) -> str:
    """Return what files without images are, such as ``3 .heic files; .heic files are not read yet: …``."""
    counts = Counter(_suffix(path) for path in paths)
    if not counts:
        return "no files at all"
    order = sorted(counts, key=lambda suffix: (suffix not in UNREAD_FORMATS, -counts[suffix], suffix))
    text = ", ".join(format_count(counts[suffix], f"{suffix} file") for suffix in order[:4])
    unread = [suffix for suffix in order if suffix in UNREAD_FORMATS]
    for suffix in unread[:1]:
        when = "in such a folder are not read" if UNREAD_FORMATS[suffix] == ALONE else "are not read yet"
        text += f"; {suffix} files {when}: {UNREAD_FORMATS[suffix]}"
    return text


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "suffixless"


def skip_reason(path: str) -> str:
    """Return why a file that is no image is skipped: its suffix, or that it is hidden."""
    if os.path.basename(path).startswith("."):
        return "hidden files"
    suffix = _suffix(path)
    return f"{suffix} (not read: {UNREAD_FORMATS[suffix]})" if suffix in UNREAD_FORMATS else suffix
