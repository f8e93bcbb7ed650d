"""Make a source of rows, each an image with a label: a number, or the name of a class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import DataError
from ...files import quote_path
from ..samples import Sample, Source, StoredImage
from ..splits import sort_by_name_hash, split_train_val
from .class_folders import SPLIT_NAMES
from .request import SourceRequest

WORDS = re.compile(r"[^A-Za-z]+")  # what separates the words in the name of a file
LABEL_NAMES = ("label", "labels", "class", "target", "cls")  # the usual names of a column
NO_LABEL = "rows without a label"


class Row(NamedTuple):
    """An image with a label.

    Attributes:
        name: Unique name in the source.
        label: Number or name of the class; None if there is none.
        image: See `Sample`.
        stamp: See `Sample`.
        block: See `Sample`.
    """

    name: str
    label: int | str | None
    image: str | StoredImage | np.ndarray
    stamp: tuple[int, int] | None = None
    block: tuple[str, int] | None = None


@dataclass
class Table:
    """The rows of a source.

    Attributes:
        kind: The kind of source, such as ``parquet``.
        splits: The rows of ``train``, ``val`` and ``test``, as far as there are any.
        origins: Where the rows of each split come from, such as ``3 files``.
        names: Names of the classes, if labels are indexes into them.
        skipped: Number of rows or files that are left out, by reason.
    """

    kind: str
    splits: dict[str, list[Row]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    names: Sequence[str] | None = None
    skipped: Counter[str] = field(default_factory=Counter)


def split_of_path(path: Path | str) -> str | None:
    """Return the split that the name of a file or of a folder that holds it contains; None if none does.

    The file's own name goes before those of folders: ``data/train-00000-of-00002.parquet``, ``train/0000.parquet``.
    """
    for part in reversed(Path(path).parts):
        for word in WORDS.split(part.lower()):
            for split, names in SPLIT_NAMES.items():
                if word in names:
                    return split
    return None


def assign_splits(paths: Iterable[str], where: Path) -> dict[str, list[str]]:
    """Return the files of each split; all are for training if no name says otherwise.

    Args:
        paths: Paths of the files, relative to the source.
        where: The source, for messages.

    Raises:
        DataError: If only some names say which split a file belongs to, or none is for training.
    """
    splits: dict[str | None, list[str]] = {}
    for path in paths:
        splits.setdefault(split_of_path(path), []).append(path)
    unknown = splits.pop(None, [])
    if not splits:
        return {"train": unknown}
    if unknown:
        raise DataError(
            f"{quote_path(where / unknown[0])}: the names of other files say train, val or test, but not this one; move"
            " it away"
        )
    if "train" not in splits:
        raise DataError(f"{quote_path(where)} has files for {' and '.join(map(str, splits))}, but none for training")
    return {str(split): files for split, files in splits.items()}


def build_source(table: Table, request: SourceRequest) -> Source:
    """Return the source that consists of the rows of a table.

    The classes are the given names that occur in training, in their order. Without names, they are the labels that
    occur in training, in the order of numbers or of the alphabet.

    Raises:
        DataError: If labels do not fit, there are fewer than two classes, or a name occurs twice.
    """
    where = quote_path(request.path)
    splits = dict(table.splits)
    if "val" in splits and "test" in splits:
        table.skipped["of the unused split test"] += len(splits.pop("test"))
    elif "test" in splits:
        splits["val"] = splits.pop("test")
        table.origins["val"] = table.origins.pop("test")
    if table.names is not None:
        splits = {split: _name_labels(rows, table.names, where) for split, rows in splits.items()}
    for split, rows in splits.items():
        splits[split] = [row for row in rows if row.label is not None]
        table.skipped[NO_LABEL] += len(rows) - len(splits[split])
    found = {row.label for row in splits["train"] if row.label is not None}
    left_out = "".join(f"; skipped: {count:,} {reason}" for reason, count in sorted((+table.skipped).items()))
    labels = _sorted_labels(found, table.names, where, left_out)
    index: dict[int | str | None, int] = {label: number for number, label in enumerate(labels)}
    if unknown := [row for row in splits.get("val", []) if row.label not in index]:
        raise DataError(
            f"{where}: the label {unknown[0].label!r} of {unknown[0].name!r} occurs in validation, but not in training"
        )
    samples = {
        split: [Sample(row.name, index[row.label], row.image, row.stamp, row.block) for row in rows]
        for split, rows in splits.items()
    }
    _refuse_duplicates(samples, where)
    if not samples.get("val"):
        samples = split_train_val(sort_by_name_hash(samples["train"]), request.val_fraction)
        table.origins.pop("val", None)
    if not samples["val"]:
        raise DataError(f"{where} has no validation split, and nothing is held out; add one, or raise --val-fraction")
    unused = sorted(set(table.names or ()) - set(map(str, labels)))
    notes = {
        "origins": table.origins,
        "val_fraction": request.val_fraction,
        "skipped": dict(sorted((+table.skipped).items())),
        "empty_classes": unused,
    }
    return Source(table.kind, list(map(str, labels)), samples, str(request.path.absolute()), notes)


def _name_labels(rows: list[Row], names: Sequence[str], where: str) -> list[Row]:
    """Replace indexes into names by the names; -1 stands for no label.

    Raises:
        DataError: If a label is neither an index of a name nor a name.
    """
    named, known = [], set(names)
    for row in rows:
        label = None if row.label == -1 else row.label
        if isinstance(label, int):
            if not 0 <= label < len(names):
                raise DataError(f"{where}: the label {label} of {row.name!r} is not among the {len(names):,} classes")
            label = names[label]
        elif label is not None and label not in known:
            raise DataError(f"{where}: the label {label!r} of {row.name!r} is not among the {len(names):,} classes")
        named.append(row._replace(label=label))
    return named


def _sorted_labels(labels: set[int | str], names: Sequence[str] | None, where: str, left_out: str) -> list[int | str]:
    """Return the classes in their order.

    Args:
        labels: The labels that occur in training.
        names: Names of the classes, if labels are indexes into them.
        where: The source, for messages.
        left_out: The end of messages: what was skipped.

    Raises:
        DataError: There are fewer than two classes, or labels are of different types.
    """
    if not labels:
        raise DataError(f"{where} has no training images with a label{left_out}")
    if len(labels) < 2:
        only = repr(next(iter(labels)))
        raise DataError(f"{where} has only one class, {only}, but training needs at least two{left_out}")
    if names is not None:
        return [name for name in names if name in labels]
    if len({type(label) for label in labels}) > 1:
        raise DataError(f"{where}: some labels are numbers and some are text; use one of them")
    return sorted(labels)


def _refuse_duplicates(samples: dict[str, list[Sample]], where: str) -> None:
    seen: set[str] = set()
    for own in samples.values():
        for sample in own:
            if sample.name in seen:
                raise DataError(f"{where} is refused: {sample.name!r} occurs twice; make it again without the second")
            seen.add(sample.name)
