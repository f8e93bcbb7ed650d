"""Read the samples of a source, in any of the forms in `FORMS`.

A form first lists names and labels without reading any image. Images are then read one by one, by processes that
receive only the place of each (`StoredImage`). To add a form, write a file with a function like the others, and add it
to `FORMS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError, DataError, format_command
from ...files import quote_path
from ..mds_index import holds_mds
from ..samples import Source
from .archives import damaged_archive
from .builtin import EMBEDDED, generate_images, read_digits
from .cifar import read_cifar, safe_unpickle
from .class_archives import read_class_archive
from .class_folders import read_class_folder
from .csv_table import read_csv
from .image_files import ALONE, UNREAD_FORMATS
from .imagenet import read_imagenet
from .npz import read_npz
from .parquet import read_parquet
from .request import SourceRequest
from .webdataset import read_webdataset

TEXT_HINT = "to prepare text for a language model, add --window 256"


class Form(NamedTuple):
    """A form of data that can be prepared.

    Attributes:
        title: What it is, for help and messages.
        read: Returns the source, or None if the path is of another form.
        columns: Whether it has columns, which can be given.
    """

    title: str
    read: Callable[[SourceRequest], Source | None]
    columns: bool = False


FORMS = (  # the first that fits is used
    Form("a CIFAR-10 or CIFAR-100 python archive", read_cifar),
    Form(
        "ImageNet as published (ILSVRC2012_img_train.tar, in one folder with the validation tar and the devkit)",
        read_imagenet,
    ),
    Form("WebDataset shards (a folder, a shard, or a pattern such as 'train-{000..146}.tar')", read_webdataset, True),
    Form("a .npz file with arrays of images and labels", read_npz, True),
    Form("a .csv file with the columns path,label or path,label,split", read_csv, True),
    Form("a tar or zip file of folders of images by class", read_class_archive),
    Form("Parquet or Arrow files with a column of images and a column of labels", read_parquet, True),
    Form("a folder of images by class", read_class_folder),
)


def read_source(source: str, val_fraction: float, columns: Mapping[str, str] | None = None) -> Source:
    """Detect the form of a source and list its samples.

    Args:
        source: A folder, a file, or the name of built-in data.
        val_fraction: Share of each class to hold out if there is no validation split.
        columns: Names of the columns that hold the ``image`` and the ``label``, where the usual names do not fit.

    Raises:
        ConfigError: If the form has no columns, or not the given ones.
        DataError: If the source is missing, empty, of an unknown form, or damaged.
        MissingDependencyError: If the form needs a package that is not installed.
    """
    if unknown := (columns or {}).keys() - {"image", "label", "split"}:
        raise ConfigError(f"--columns {min(unknown)}=…: expected image=NAME,label=NAME, and for CSV files split=NAME")
    if source == "made-up":
        return generate_images()
    if source in EMBEDDED:
        return read_digits(development=source == "digits-dev")
    from ..text.files import EMBEDDED_TEXT, holds_only_text

    request = SourceRequest(Path(source), val_fraction, columns or {})
    is_text = source in EMBEDDED_TEXT or holds_only_text(request.path)
    if is_text and not request.path.is_file():
        name = source if source in EMBEDDED_TEXT else quote_path(source)
        raise DataError(f"{name} is text, not images; {TEXT_HINT}")
    if holds_mds(request.path):
        command = format_command("data", "adopt", request.path)
        raise DataError(
            f"{quote_path(request.path)} holds shards of mosaicml-streaming, which are used as they are: {command}"
        )
    for form in FORMS:
        if (found := form.read(request)) is not None:
            if columns and not form.columns:
                raise ConfigError(f"--columns: {quote_path(source)} is {form.title}, which has no columns")
            if columns and "split" in columns and form.read is not read_csv:
                raise ConfigError(f"--columns split=…: only CSV files have such a column, not {form.title}")
            return found
    path, known = request.path, ", ".join(form.title for form in FORMS) + ", or " + " or ".join(EMBEDDED)
    if not os.path.lexists(path):
        raise DataError(f"no such source: {quote_path(path)}; expected a file, a folder, or {', '.join(EMBEDDED)}")
    action = UNREAD_FORMATS.get(path.suffix.lower())
    if action == ALONE:
        raise damaged_archive(path, f"it does not begin as a {path.suffix} file")
    if action is not None:
        raise DataError(f"{quote_path(path)}: {path.suffix} files are not read yet: {action}, in one folder per class")
    hint = f"; {TEXT_HINT}" if is_text else ""
    raise DataError(f"{quote_path(path)}: unknown kind of source; expected {known}{hint}")
