"""The names of the validation images of prepared data, in the order of the samples.

Published lists of labels for a validation split are in the order of its file names. Prepared samples are shuffled and
have no names, so the names are stored in a separate file next to the description.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..files import quote_path, write_text
from .dataset import DatasetInfo, read_json

NAMES_FILE = "val-names.json"


def write_names(info: DatasetInfo, names: Sequence[str]) -> None:
    """Write the names of the validation images.

    Args:
        info: The data set.
        names: The names in the source, in the order of the samples.
    """
    write_text(info.path / NAMES_FILE, json.dumps({"digest": info.digest, "names": [*names]}, indent=0) + "\n")


def has_names(info: DatasetInfo) -> bool:
    """Return whether the names of the validation images are known."""
    return (info.path / NAMES_FILE).exists()


def read_names(info: DatasetInfo) -> list[str]:
    """Return the names of the validation images, in the order of the samples.

    Raises:
        DataError: They are not known.
    """
    again = "run the same `bigincubate data prepare` again, which adds them (not possible for adopted data)"
    if not has_names(info):
        raise DataError(f"{quote_path(info.path)} does not hold the names of its validation images; {again}")
    file: Path = info.path / NAMES_FILE
    stored = read_json(file)
    names = stored.get("names")
    if stored.get("digest") != info.digest or not isinstance(names, list) or len(names) != info.samples["val"]:
        raise DataError(f"{quote_path(file)} does not belong to this data; delete it and {again}")
    return [str(name) for name in names]
