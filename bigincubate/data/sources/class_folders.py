"""Read a tree of images: one folder per class, with or without folders for the splits."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import DataError, format_count
from ...files import quote_path
from ..samples import Sample, Source
from ..splits import sort_by_name_hash, split_train_val
from .image_files import FolderFinder, ImageFinder, describe_files
from .request import SourceRequest

SPLIT_NAMES = {  # in lower case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
LAYOUT = "expected one folder per class, or such folders in train/ and val/"


def read_class_folder(request: SourceRequest) -> Source | None:
    """List the images of a folder with one folder per class; None for anything but a folder.

    Raises:
        DataError: If the layout is not that of classes and splits, or a class has no training images.
    """
    if not request.path.is_dir():
        return None
    root = Path(os.path.abspath(request.path))
    if (root / "dataset.json").exists():
        raise DataError(f"{quote_path(root)} is prepared data already; use it with --set data.path={quote_path(root)}")
    return read_class_folders(root, FolderFinder(), request.val_fraction)


def read_class_folders(root: Path, finder: ImageFinder, val_fraction: float) -> Source:
    """List the images of a tree of folders.

    Args:
        root: The absolute path of the tree.
        finder: Lists the folders and files of the tree.
        val_fraction: Share of each class to hold out if there is no folder for validation.

    Raises:
        DataError: If the layout is not that of classes and splits, or a class has no training images.
    """
    parts, unused = _find_splits(root, finder)
    classes = list(finder.subfolders(parts["train"]))
    _check_classes(parts["train"], classes, finder)
    folders: dict[tuple[str, int], Path] = {}
    for split, folder in parts.items():
        found = finder.subfolders(folder)
        if unknown := [name for name in found if name not in classes and finder.holds_images(found[name])]:
            raise DataError(
                f"{quote_path(found[unknown[0]])}: this class has no training images (the classes are"
                f" {', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}); rename or remove the folder"
            )
        folders |= {(split, label): found[name] for label, name in enumerate(classes) if name in found}
    files = finder.find(folders)
    for folder in {root, *parts.values()}:
        finder.count_skipped(folder)
    if not any(files.values()):
        raise DataError(f"no images in {quote_path(root)}: found {describe_files(finder.walk(root))}; {LAYOUT}")
    splits: dict[str, list[Sample]] = {split: [] for split in parts}
    for (split, label), images in files.items():
        if split == "train" and not images:
            raise DataError(_no_images(folders[split, label], finder))
        splits[split] += [
            Sample(os.path.relpath(path, root), label, stored or path, stamp) for path, stamp, stored in images
        ]
    if "val" not in splits:
        splits = _hold_out(root, splits["train"], val_fraction)
    if not splits["val"]:
        raise DataError(_no_images(parts["val"], finder))
    notes = {
        "folders": {split: os.path.relpath(folder, root) for split, folder in parts.items()},
        "val_fraction": val_fraction,
        "unused": unused,
        "skipped": dict(sorted(finder.skipped.items())),
        "linked": [[os.path.relpath(path, root) for path in pair] for pair in finder.linked[:3]],
    }
    return Source("images", classes, splits, str(root), notes)


def is_split_name(name: str) -> bool:
    """Return whether a folder has the name of a split, in upper or lower case."""
    return any(name.lower() in names for names in SPLIT_NAMES.values())


def _find_splits(root: Path, finder: ImageFinder) -> tuple[dict[str, Path], list[str]]:
    """Return the folder of each split (only ``train`` if there is none for validation), and the unused folders."""
    folders = finder.subfolders(root)
    by_split: dict[str, list[str]] = {
        split: [name for name in folders if name.lower() in names] for split, names in SPLIT_NAMES.items()
    }
    others = [name for name in folders if not any(name in found for found in by_split.values())]
    for found in by_split.values():
        if len(found) > 1:
            raise DataError(f"{quote_path(root)} has {' and '.join(f'{name}/' for name in found)}; keep one of them")
    held_out = by_split["val"] or by_split["test"]
    if not by_split["train"]:
        if held_out:
            raise DataError(
                f"{quote_path(root)} has {held_out[0]}/ but no train/; add it. (If {held_out[0]} is a class, move the"
                " folders of all classes into a folder train/)"
            )
        return {"train": root}, []
    train = folders[by_split["train"][0]]
    if not finder.subfolders(train):
        if others and not held_out and finder.holds_images(train):
            return {"train": root}, []  # a class of vehicles
        raise DataError(
            f"{quote_path(train)} has no folders of classes: {_describe(train, finder)};"
            f" expected {train.name}/CLASS/*.jpg"
        )
    if images := [name for name in others if finder.holds_images(folders[name])]:
        raise DataError(
            f"{quote_path(root)} has {', '.join(f'{name}/' for name in images[:3])} next to {train.name}/: neither"
            f" training nor validation (val/ or test/). If it is a class, move it into {train.name}/; otherwise away"
        )
    unused = [*others, *(by_split["test"] if by_split["val"] else [])]
    parts = {"train": train}
    return (parts | {"val": folders[held_out[0]]} if held_out else parts), unused


def _check_classes(folder: Path, classes: list[str], finder: ImageFinder) -> None:
    """Refuse fewer than two classes, and classes that have folders for splits: the source is another folder.

    Raises:
        DataError: If the folders in ``folder`` are not classes.
    """
    if not classes or (len(classes) == 1 and not finder.holds_images(folder / classes[0])):
        raise DataError(f"no images in {quote_path(folder)}: {_describe(folder, finder)}; {LAYOUT}")
    for name in classes:
        inner = finder.subfolders(folder / name)
        splits = [entry for entry in inner if is_split_name(entry)]
        if splits and all(entry in splits for entry in inner):
            raise DataError(
                f"{quote_path(folder / name)} has {', '.join(f'{entry}/' for entry in splits)}, so {name} is no class;"
                f" prepare {quote_path(folder / name)}"
            )
    if len(classes) > 1:
        return
    deeper = folder / classes[0]
    for _ in range(8):  # a link could lead in circles
        inner = finder.subfolders(deeper)
        if len(inner) != 1:
            break
        deeper /= next(iter(inner))
    advice = f"if {_names(inner)} are the classes, prepare {quote_path(deeper)}" if inner else "add the others"
    raise DataError(f"{quote_path(folder)} has only one class, {classes[0]}, but training needs at least two; {advice}")


def _hold_out(root: Path, samples: list[Sample], fraction: float) -> dict[str, list[Sample]]:
    splits = split_train_val(sort_by_name_hash(samples), fraction)
    if splits["val"]:
        return splits
    reason = "nothing is held out" if not fraction else "every class has only one image, so none can be held out"
    raise DataError(f"{quote_path(root)} has no folder val/, and {reason}: validation would have no images; add val/")


def _no_images(folder: Path, finder: ImageFinder) -> str:
    linked = next((other for path, other in finder.linked if Path(path).is_relative_to(folder)), None)
    found = f"what it leads to is counted as {linked} already" if linked else _describe(folder, finder)
    return f"no images in {quote_path(folder)}: {found}; add images or remove the folder"


def _describe(folder: Path, finder: ImageFinder) -> str:
    """Return what a folder without classes holds."""
    files = finder.files_in(folder)
    images = sum(map(finder.is_image, files))
    if not images:
        return f"found {describe_files(finder.walk(folder))}"
    tables = [file for file in files if file.endswith((".csv", ".json", ".jsonl", ".txt"))]
    more = ""
    if tables:
        name = os.path.basename(tables[0])
        is_csv = name.endswith(".csv")
        more = f" and {name}{'; prepare it if it lists labels' if is_csv else ', but labels in a file are not read'}"
    return f"found {format_count(images, 'image')} without a folder of a class{more}"


def _names(folders: dict[str, Path]) -> str:
    return ", ".join(list(folders)[:3]) + (", …" if len(folders) > 3 else "")
