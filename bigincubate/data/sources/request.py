"""What a user asked to prepare, before its form is known."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .archives import Archive, list_archive
from .image_files import has_image_suffix, walk_files

LISTING_THREADS = 8  # listing over a million headers waits for the disk, mostly


@dataclass(frozen=True)
class SourceRequest:
    """What a user asked to prepare.

    Attributes:
        path: Path of a file or folder.
        val_fraction: Share of each class to hold out if there is no validation split.
        columns: The columns that hold the ``image`` and the ``label``, where the form has columns.
    """

    path: Path
    val_fraction: float
    columns: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def archive(self) -> Archive | None:
        """Return the members of a tar or zip file, listed once for all forms; None for anything else.

        Raises:
            DataError: If the archive is damaged or refused.
        """
        return list_archive(self.path) if self.path.is_file() else None

    def holds(self, suffix: str) -> list[str]:
        """Return the paths of the files with a suffix, if the path is a folder that holds them and no images.

        The paths are relative to the folder. Hidden files and folders are left out, and links to folders not followed.
        """
        found: list[str] = []
        if self.path.is_dir() and not (self.path / "dataset.json").exists():
            for path in walk_files(self.path):
                if has_image_suffix(path):
                    return []
                if path.lower().endswith(suffix):
                    found.append(os.path.relpath(path, self.path))
        return found
