"""Find the images of class folders in a tar or zip file, by the rules for folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import DataError
from ...files import quote_path
from .archives import Archive, Member
from .class_folders import is_split_name
from .image_files import (
    ImageFile,
    ImageFinder,
    Key,
    has_image_signature,
    has_image_suffix,
    is_skipped_folder,
    skip_reason,
)


class _Folder:
    """A folder in an archive: its folders and its files by name."""

    def __init__(self) -> None:
        self.folders: dict[str, _Folder] = {}
        self.files: dict[str, Member] = {}


class ArchiveFinder(ImageFinder):
    """Finds images in an archive. Its paths are the path of the archive and the name in the archive.

    Args:
        archive: The archive.

    Raises:
        DataError: If a file of the archive has the name of a folder.
    """

    def __init__(self, archive: Archive) -> None:
        super().__init__()
        self.skipped += archive.skipped
        self._archive, self._top = archive, _Folder()
        for member in archive.members:
            *parents, name = member.name.split("/")
            folder = self._top
            for parent in parents:
                folder = folder.folders.setdefault(parent, _Folder())
            folder.files[name] = member
        for where, folder in _walk(self._top, ""):
            if both := folder.folders.keys() & folder.files.keys():
                name = repr(where + min(both))
                raise DataError(f"{quote_path(archive.file)} is refused: {name} is a file and a folder; make it again")

    def find_root(self) -> Path:
        """Return the folder that holds the classes or splits, below folders that hold only one other folder."""
        root = self._archive.file
        while len(folders := self.subfolders(root)) == 1:
            name, inner = next(iter(folders.items()))
            if is_split_name(name) or not self.subfolders(inner):
                break
            self.count_skipped(root)
            root = inner
        return root

    def subfolders(self, folder: Path) -> dict[str, Path]:
        """Return the folders in ``folder`` that may hold images, sorted by name."""
        return {name: folder / name for name in sorted(self._folder(folder).folders) if not is_skipped_folder(name)}

    def find(self, folders: Mapping[Key, Path]) -> dict[Key, list[ImageFile]]:
        """Return the image files below each folder, sorted by path."""
        found: dict[Key, list[ImageFile]] = {key: [] for key in folders}
        for key, path in folders.items():
            self._find(self._folder(path), str(path), found[key])
        return {key: sorted(files, key=lambda file: file.path) for key, files in found.items()}

    def count_skipped(self, folder: Path) -> None:
        """Count what lies in ``folder`` but in none of its folders that may hold images."""
        entry = self._folder(folder)
        self._count_skipped_folders(entry)
        for name, member in entry.files.items():
            image = self._is_image(member) and not name.startswith(".")
            self.skipped["images outside of the class folders" if image else skip_reason(name)] += 1

    def files_in(self, folder: Path) -> list[str]:
        """Return the paths of the files in ``folder``, without those in its folders."""
        return [str(folder / name) for name in sorted(self._folder(folder).files)]

    def walk(self, folder: Path) -> Iterator[str]:
        """Yield the paths of all files below ``folder`` that are not hidden."""
        for where, entry in _walk(self._folder(folder), f"{folder}/", hidden=False):
            yield from (where + name for name in sorted(entry.files) if not name.startswith("."))

    def is_image(self, path: str) -> bool:
        """Return whether a file is an image by its suffix, or by its first bytes if its suffix is another."""
        folder, name = os.path.split(path)
        return self._is_image(self._folder(Path(folder)).files[name])

    def _folder(self, path: Path) -> _Folder:
        folder = self._top
        for name in path.relative_to(self._archive.file).parts:
            folder = folder.folders[name]
        return folder

    def _find(self, folder: _Folder, path: str, found: list[ImageFile]) -> None:
        self._count_skipped_folders(folder)
        for name, inner in folder.folders.items():
            if not is_skipped_folder(name):
                self._find(inner, f"{path}/{name}", found)
        for name, member in folder.files.items():
            if name.startswith("."):
                self.skipped["hidden files"] += 1
            elif self._is_image(member):
                found.append(ImageFile(f"{path}/{name}", (member.size, self._archive.modified), member.stored))
            else:
                self.skipped[skip_reason(name)] += 1

    def _count_skipped_folders(self, folder: _Folder) -> None:
        for name, inner in folder.folders.items():
            if is_skipped_folder(name):
                self.skipped[f"in folders {name}"] += sum(len(entry.files) for _, entry in _walk(inner, ""))

    def _is_image(self, member: Member) -> bool:
        if has_image_suffix(member.name) or self._archive.compressed:
            return has_image_suffix(member.name)
        try:
            return has_image_signature(member.stored.read(12))
        except ValueError:  # damaged
            return False


def _walk(folder: _Folder, path: str, *, hidden: bool = True) -> Iterator[tuple[str, _Folder]]:
    """Yield the path, with a slash at the end, of a folder and of each folder below it."""
    yield path, folder
    for name in sorted(folder.folders):
        if hidden or not is_skipped_folder(name):
            yield from _walk(folder.folders[name], f"{path}{name}/", hidden=hidden)
