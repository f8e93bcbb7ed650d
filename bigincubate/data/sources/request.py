"""What a user asked to prepare, before its form is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .archives import Archive, list_archive


@dataclass(frozen=True)
class SourceRequest:
    """What a user asked to prepare.

    Attributes:
        path: Path of a file or folder.
        val_fraction: Share of each class to hold out if there is no validation split.
    """

    path: Path
    val_fraction: float

    @cached_property
    def archive(self) -> Archive | None:
        """Return the members of a tar or zip file, listed once for all forms; None for anything else.

        Raises:
            DataError: If the archive is damaged or refused.
        """
        return list_archive(self.path) if self.path.is_file() else None
