"""Read the samples of a source: a folder of images, a CIFAR archive, scikit-learn's digits, or generated images."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from ...errors import DataError
from ...files import quote_path
from ..samples import Source
from .builtin import EMBEDDED, generate_images, read_digits
from .cifar import read_cifar_archive, read_cifar_folder, safe_unpickle
from .class_folders import read_class_folders
from .image_files import UNREAD_FORMATS, FolderFinder


def read_source(source: str, val_fraction: float) -> Source:
    """Detect the kind of a source and list its samples.

    Args:
        source: A folder, an archive, or the name of built-in data.
        val_fraction: Share of each class to hold out if a folder of images has no validation split.

    Raises:
        DataError: If the source is missing, empty, of an unknown kind, or damaged.
    """
    if source == "made-up":
        return generate_images()
    if source in EMBEDDED:
        return read_digits(development=source == "digits-dev")
    path = Path(source)
    if path.is_file() and tarfile.is_tarfile(path):
        return read_cifar_archive(path)
    if path.is_dir():
        return read_cifar_folder(path) or _read_folder(path, val_fraction)
    known = "a folder of images by class, a CIFAR-10 or CIFAR-100 python archive, or " + " or ".join(EMBEDDED)
    if not os.path.lexists(path):
        raise DataError(f"no such source: {quote_path(path)}; expected {known}")
    if path.suffix.lower() in UNREAD_FORMATS:
        action = UNREAD_FORMATS[path.suffix.lower()]
        raise DataError(f"{quote_path(path)}: {path.suffix} files are not read yet: {action}, in one folder per class")
    raise DataError(f"{quote_path(path)}: unknown kind of source; expected {known}")


def _read_folder(path: Path, val_fraction: float) -> Source:
    root = Path(os.path.abspath(path))
    if (root / "dataset.json").exists():
        raise DataError(f"{quote_path(root)} is prepared data already; use it with --set data.path={quote_path(root)}")
    return read_class_folders(root, FolderFinder(), val_fraction)
