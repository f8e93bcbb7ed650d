"""Read class folders that are packed in a tar or zip file, as if they had been unpacked."""

from __future__ import annotations

from dataclasses import replace

from ..samples import Source
from .archive_finder import ArchiveFinder
from .class_folders import read_class_folders
from .request import SourceRequest


def read_class_archive(request: SourceRequest) -> Source | None:
    """Return the images of a tar or zip file of class folders; None for anything but a tar or zip file.

    Raises:
        DataError: If the layout is not that of classes and splits, or a class has no training images.
    """
    if (archive := request.archive) is None:
        return None
    finder = ArchiveFinder(archive)
    source = read_class_folders(finder.find_root(), finder, request.val_fraction)
    return replace(source, compressed=str(archive.file)) if archive.compressed else source
