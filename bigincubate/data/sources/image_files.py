"""Find the image files in folders. Each real folder and each real file counts once, however many links lead to it."""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
# the first bytes of image files; those of BMP and PPM are too short to tell them from text
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# besides hidden folders; written by file systems and photo software
SKIPPED_FOLDERS = ("@eadir", "__macosx", "__pycache__", "lost+found", "$recycle.bin", "thumbnails")
CONVERT, UNPACK, EXTRACT = "convert them to PNG or JPEG", "unpack them", "write their images as files"
UNREAD_FORMATS = {  # formats that hold images but are not read, and what to do
    **dict.fromkeys(
        (".avif", ".heic", ".heif", ".jxl", ".jp2", ".dcm", ".svg", ".ico", ".psd", ".exr", ".npy"), CONVERT
    ),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"), UNPACK),
    **dict.fromkeys((".parquet", ".arrow", ".tfrecord", ".h5", ".hdf5", ".lmdb", ".mdb", ".npz", ".rec"), EXTRACT),
    **dict.fromkeys((".mds", ".pkl", ".pickle", ".mat"), EXTRACT),
}
Key = TypeVar("Key", bound=Hashable)


class ImageFile(NamedTuple):
    """A file to read.

    Attributes:
        path: Its path.
        stamp: Its size in bytes and modification time in nanoseconds; (-1, -1) for a broken link.
    """

    path: str
    stamp: tuple[int, int]


class ImageFinder:
    """Finds images in folders and counts what it skips.

    Attributes:
        skipped: Number of skipped files by reason.
        linked: For each skipped link: its path and the path of what was counted instead.
    """

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.linked: list[tuple[str, str]] = []
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
            elif is_image_file(entry.path) and not entry.name.startswith("."):
                self.skipped["images outside of the class folders"] += 1
            else:
                self.skipped[_reason(entry.name)] += 1

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
        elif not is_image_file(path):
            self.skipped[_reason(path)] += 1
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


def is_image_file(path: str) -> bool:
    """Return whether a file is an image by its suffix, or by its first bytes if the suffix is not that of an image."""
    if path.lower().endswith(SUFFIXES):
        return True
    if not os.path.isfile(path):  # reading a pipe may never end
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(SIGNATURES) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files that are not hidden, below ``folder``; links to folders are not followed."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_skipped_folder(name))
        yield from (os.path.join(where, name) for name in sorted(names) if not name.startswith("."))


def describe_files(folder: Path) -> str:
    """Return what a folder without images holds, such as ``3 .parquet files, which are not read: …``."""
    counts = Counter(_suffix(path) for path in walk_files(folder))
    if not counts:
        return "no files at all"
    order = sorted(counts, key=lambda suffix: (suffix not in UNREAD_FORMATS, -counts[suffix], suffix))
    text = ", ".join(f"{counts[suffix]:,} {suffix} file{'s' * (counts[suffix] > 1)}" for suffix in order[:4])
    unread = [suffix for suffix in order if suffix in UNREAD_FORMATS]
    return text + "".join(f"; {suffix} files are not read yet: {UNREAD_FORMATS[suffix]}" for suffix in unread[:1])


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "suffixless"


def _reason(path: str) -> str:
    if os.path.basename(path).startswith("."):
        return "hidden files"
    suffix = _suffix(path)
    return f"{suffix} (not read: {UNREAD_FORMATS[suffix]})" if suffix in UNREAD_FORMATS else suffix
