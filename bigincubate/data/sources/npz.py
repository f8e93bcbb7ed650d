"""Read arrays of images and labels from a ``.npz`` file of numpy. All arrays are read into memory."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import ConfigError, DataError
from ...files import quote_path
from ..samples import Source
from .archives import DAMAGED, damaged_archive
from .labeled_rows import Row, Table, build_source, split_of_path
from .request import SourceRequest

SUFFIX = ".npz"
WORDS = {  # words in the name of an array that say what it holds; the name may also contain a split: x_train, data
    "image": ("x", "image", "images", "img", "imgs", "data", "pixels"),
    "label": ("y", "label", "labels", "target", "targets"),
}


def read_npz(request: SourceRequest) -> Source | None:
    """Return the images of a ``.npz`` file; None for anything else.

    Arrays belong together if their names differ only in the words for images and labels: ``x_train`` and ``y_train``,
    ``val_images`` and ``val_labels``.

    Raises:
        ConfigError: If a given array does not exist.
        DataError: If the file is damaged, or the arrays are not images and labels.
    """
    file = request.path
    if not file.is_file() or file.suffix.lower() != SUFFIX:
        return None
    status, table = file.stat(), Table("npz")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            pairs = _find_pairs(file, arrays.files, request.columns)
            loaded = {split: (name, arrays[name], arrays[label]) for split, (name, label) in pairs.items()}
    except DAMAGED as error:
        # numpy has no class of its own for this, and takes a file that is not a zip file for a pickle
        if "allow_pickle" in str(error) and zipfile.is_zipfile(file):
            raise DataError(
                f"{quote_path(file)} has an array of Python objects, which is not read because it may hold any code;"
                " save labels as numbers, or as text with labels.astype(str)"
            ) from None
        raise damaged_archive(file, str(error)) from None
    for split, (name, images, labels) in loaded.items():
        pixels, values = _check_images(file, name, images), _check_labels(file, name, labels, len(images))
        stamp = (status.st_size, status.st_mtime_ns)
        rows = [Row(f"{name}/{row}", label, pixels[row], stamp) for row, label in enumerate(values)]
        table.splits[split], table.origins[split] = rows, name
    return build_source(table, request)


def _find_pairs(file: Path, names: list[str], given: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the names of the arrays of images and labels of each split."""
    have = ", ".join(names[:10])
    if given:
        pair = given.get("image", ""), given.get("label", "")
        if not set(pair) <= set(names):
            raise ConfigError(f"--columns: {file.name} has the arrays {have}; give image=NAME,label=NAME of them")
        return {"train": pair}
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        for what, words in WORDS.items():
            if set(re.split(r"[^a-z]+", name.lower())) & set(words):
                found.setdefault(split_of_path(name) or "train", {}).setdefault(what, []).append(name)
    for split, arrays in found.items():
        if sorted(map(len, arrays.values())) != [1, 1]:
            raise DataError(
                f"{quote_path(file)} has no pair of images and labels for {split}, but {have}; choose two arrays with"
                " --columns image=NAME,label=NAME"
            )
    if "train" not in found:
        raise DataError(
            f"{quote_path(file)} has the arrays {have or 'of no name'}; expected names such as x_train, y_train, or"
            " --columns image=NAME,label=NAME"
        )
    return {split: (arrays["image"][0], arrays["label"][0]) for split, arrays in found.items()}


def _check_images(file: Path, name: str, images: np.ndarray) -> np.ndarray:
    """Return images as [N, H, W] or [N, H, W, 3]."""
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise DataError(
            f"{quote_path(file)}: {name} is {images.dtype} of the shape {list(images.shape)}; expected uint8 of the"
            " shape [N, H, W], [N, H, W, 3] or [N, 3, H, W]"
        )
    if 0 in images.shape[1:]:
        raise DataError(f"{quote_path(file)}: {name} has the shape {list(images.shape)}, so its images have no pixels")
    return images


def _check_labels(file: Path, name: str, labels: np.ndarray, count: int) -> list[int | str]:
    flat = labels.reshape(-1) if labels.shape in ((count,), (count, 1)) else None
    if flat is None or flat.dtype.kind not in "iuU":
        raise DataError(
            f"{quote_path(file)}: the labels of {name} are {labels.dtype} of the shape {list(labels.shape)}; expected"
            f" {count:,} integers or names"
        )
    return flat.tolist()
