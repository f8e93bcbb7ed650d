"""Read the samples of a source, in any of the forms in `FORMS`.

A form lists names and labels first, without reading any image; images are then read one by one, by processes that got
only their place (`StoredImage`). To add a form, write a file with a function like the others, and add it to `FORMS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from ...files import quote_path
from ..samples import Source
from .builtin import EMBEDDED, generate_images, read_digits
from .cifar import read_cifar, safe_unpickle
from .class_archives import read_class_archive
from .class_folders import read_class_folder
from .image_files import UNREAD_FORMATS
from .imagenet import read_imagenet
from .request import SourceRequest


class Form(NamedTuple):
    """A form of data that can be prepared.

    Attributes:
        title: What it is, for help and messages.
        read: Returns the source, or None if the path is of another form.
    """

    title: str
    read: Callable[[SourceRequest], Source | None]


FORMS = (  # the first that fits is used
    Form("a CIFAR-10 or CIFAR-100 python archive", read_cifar),
    Form(
        "ImageNet as published (ILSVRC2012_img_train.tar, with the validation tar and devkit beside it)", read_imagenet
    ),
    Form("a tar or zip file of such folders", read_class_archive),
    Form("a folder of images by class", read_class_folder),
)


def read_source(source: str, val_fraction: float) -> Source:
    """Detect the form of a source and list its samples.

    Args:
        source: A folder, a file, or the name of built-in data.
        val_fraction: Share of each class to hold out if there is no validation split.

    Raises:
        DataError: If the source is missing, empty, of an unknown form, or damaged.
    """
    if source == "made-up":
        return generate_images()
    if source in EMBEDDED:
        return read_digits(development=source == "digits-dev")
    request = SourceRequest(Path(source), val_fraction)
    for form in FORMS:
        if (found := form.read(request)) is not None:
            return found
    path, known = request.path, ", ".join(form.title for form in FORMS) + ", or " + " or ".join(EMBEDDED)
    if not os.path.lexists(path):
        raise DataError(f"no such source: {quote_path(path)}; expected {known}")
    if path.suffix.lower() in UNREAD_FORMATS:
        action = UNREAD_FORMATS[path.suffix.lower()]
        raise DataError(f"{quote_path(path)}: {path.suffix} files are not read yet: {action}, in one folder per class")
    raise DataError(f"{quote_path(path)}: unknown kind of source; expected {known}")
