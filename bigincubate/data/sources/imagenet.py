"""Read ImageNet as it is published: a tar of one tar per class, a tar of validation images, and the development kit.

The images get the names of the usual folders (``train/n01440764/n01440764_10026.JPEG``), so the data is the same.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from ...files import quote_path
from ..samples import Source
from .archive_finder import ArchiveFinder
from .archives import DAMAGED, Archive, Member, Window, damaged_archive, list_archive, list_tar
from .class_folders import read_class_folders
from .image_files import has_image_suffix
from .request import LISTING_THREADS, SourceRequest
from .slices import FileSlice

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")
META, GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
MAX_FILE_BYTES = 2**26  # limit for a file of the development kit


class Devkit(NamedTuple):
    """What the development kit says.

    Attributes:
        classes: The class (WordNet ID) of each validation image, in the order of their numbers.
        words: The words for each class.
    """

    classes: list[str]
    words: dict[str, str]


def read_imagenet(request: SourceRequest) -> Source | None:
    """Return the images of ImageNet; None if the path is neither a tar of tars nor a folder with one.

    The path is that of `TRAIN` or of a folder that holds it. `VAL` and the development kit are in the same folder.
    Without `VAL`, a part of the training images is held out.

    Raises:
        DataError: If an archive is damaged, or the labels of the validation images are missing or do not fit.
    """
    folder = request.path if request.path.is_dir() else request.path.parent
    if request.path.is_dir():
        if not (folder / TRAIN).is_file():
            return None
        train: Archive | None = _list_tar_file(folder / TRAIN)
    else:
        train = request.archive
    if train is None or train.compressed or not _holds_tars(train):
        return None
    merged = Archive(Path(os.path.abspath(folder)), "tar", skipped=train.skipped, modified=train.modified)
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        for members, skipped in pool.map(partial(_list_class, train.file), train.members):
            merged.members += members
            merged.skipped += skipped
    origins = {"train": train.file.name}
    devkit = None
    if (folder / VAL).is_file():
        devkit, val = _read_devkit(folder), _list_tar_file(folder / VAL)
        merged.members += _label_validation(val, devkit)
        merged.skipped += val.skipped
        merged.modified += val.modified  # changes if one of them does
        origins["val"] = VAL
    source = read_class_folders(merged.file, ArchiveFinder(merged), request.val_fraction)
    del source.notes["folders"]
    source.notes["origins"] = origins
    if devkit:
        source.notes["class_words"] = devkit.words
    return source


def _list_tar_file(path: Path) -> Archive:
    """List the members of a file that must be a tar file.

    Raises:
        DataError: If it is not, or is damaged.
    """
    if (archive := list_archive(path)) is None:
        raise damaged_archive(path, "it does not begin as a tar file")
    return archive


def _holds_tars(archive: Archive) -> bool:
    return bool(archive.members) and all(member.name.endswith(".tar") for member in archive.members)


def _list_class(file: Path, outer: Member) -> tuple[list[Member], Counter[str]]:
    """Return the images of one class: the members of a tar file inside a tar file."""
    place, skipped = outer.stored, Counter[str]()
    assert isinstance(place, FileSlice)
    with file.open("rb") as data:
        window = Window(data, place.offset, place.size)
        try:
            members = list_tar(window, file, skipped, place.offset, f"{outer.name}/")
        except ValueError as error:
            raise damaged_archive(file, f"{outer.name}: {error}") from None
    label = outer.name.removesuffix(".tar")
    return [member._replace(name=f"train/{label}/{member.name}") for member in members], skipped


def _label_validation(archive: Archive, devkit: Devkit) -> list[Member]:
    """Return the validation images with names like those in folders of classes."""
    found, where = [], quote_path(archive.file)
    for member in archive.members:
        name = os.path.basename(member.name)
        if not has_image_suffix(name) or name.startswith("."):
            archive.skipped["validation files that are no images"] += 1
            continue
        match = VAL_NAME.fullmatch(name)
        number = int(match[1]) if match else 0
        if not 0 < number <= len(devkit.classes):
            raise DataError(f"{where}: {name} has no label among the {len(devkit.classes):,} of {GROUND_TRUTH}")
        found.append(member._replace(name=f"val/{devkit.classes[number - 1]}/{name}"))
    if len(found) != len(devkit.classes):
        raise DataError(
            f"{where} has {len(found):,} images, but {GROUND_TRUTH} has {len(devkit.classes):,} labels; get both again"
        )
    return found


def _read_devkit(folder: Path) -> Devkit:
    path = next((folder / name for name in DEVKITS if (folder / name).exists()), None)
    if path is None:
        raise DataError(
            f"{quote_path(folder / VAL)} has no labels; put {DEVKITS[0]}, which has them, into the same folder, or move"
            f" {VAL} away to hold out a part of the training images"
        )
    try:
        files = _read_devkit_folder(path) if path.is_dir() else _read_devkit_archive(path)
    except DAMAGED as error:
        raise damaged_archive(path, str(error)) from None
    if missing := {META, GROUND_TRUTH} - files.keys():
        raise DataError(f"{quote_path(path)} has no file {min(missing)}; get it again")
    try:
        names, words = _parse_meta(files[META])
        return Devkit([names[int(line)] for line in files[GROUND_TRUTH].split()], words)
    except Exception as error:  # the type depends on how the parser of MATLAB files fails
        raise DataError(f"{quote_path(path)} is not that of ImageNet 2012: {error!r}; get it again") from None


def _read_devkit_folder(path: Path) -> dict[str, bytes]:
    found = {name: [*path.rglob(name)] for name in (META, GROUND_TRUTH)}
    return {name: files[0].read_bytes() for name, files in found.items() if files}


def _read_devkit_archive(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = os.path.basename(member.name)
            if name in (META, GROUND_TRUTH) and member.isreg() and member.size <= MAX_FILE_BYTES:
                file = tar.extractfile(member)
                assert file is not None  # a regular file
                found[name] = file.read()
    list_archive(path)  # reads on to the checksum at the end, which the loop above does not reach
    return found


def _parse_meta(data: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """Return the WordNet ID of each number of a class, and the words for each WordNet ID."""
    from scipy.io import loadmat

    names, words = {}, {}
    for synset in loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]:
        if int(synset["num_children"]) == 0:
            names[int(synset["ILSVRC2012_ID"])] = str(synset["WNID"])
            words[str(synset["WNID"])] = str(synset["words"])
    return names, words
