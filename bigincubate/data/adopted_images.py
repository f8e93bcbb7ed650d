"""Adopted labeled images: their columns, the checks of each record, and their schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from ..errors import ConfigError
from .dataset import RecordSchema
from .images import LABELLED_IMAGE, decode_image
from .mds_index import MdsSplit, find_encodings, read_class_names
from .source_summary import describe_counts
from .stored_records import IMAGE_ENCODINGS, INTEGER_ENCODINGS, NAME_ENCODING

MAX_CLASSES = 1_000_000  # limit if classes have no names, when the largest label determines their number

ReadColumn = Callable[[str], Any]  # returns the value of a column of a record


class Description(NamedTuple):
    """The content of the description of adopted data.

    Attributes:
        schema: Schema of the records.
        summary: Counts, as plain JSON values.
        lines: The same as lines of text.
    """

    schema: RecordSchema
    summary: dict[str, Any]
    lines: list[str]


class AdoptedRecords(Protocol):
    """Records of one kind that are adopted. It can be pickled."""

    unit: ClassVar[str]
    """Name of the records in messages, in the singular, such as ``image``."""

    @property
    def stored(self) -> dict[str, str]:
        """The name that each column has in the shards."""

    @property
    def given(self) -> dict[str, Any]:
        """The options about the records that determine the description, as plain JSON values."""

    @property
    def reading_schema(self) -> RecordSchema:
        """The schema for reading the records while they are checked, which may lack metadata."""

    def measure(self, read: ReadColumn, *, first: bool) -> int:
        """Check a record, and return its measure, which is counted: its label, or its number of tokens.

        Args:
            read: Returns the value of a column.
            first: Whether this is the first record of a shard.

        Raises:
            ValueError: If the record is not valid.
        """

    def describe(self, counts: Mapping[str, Counter[int]]) -> Description:
        """Return the description, given how often each measure occurs in each split."""

    def add_files(self, folder: Path) -> None:
        """Write further files of the description to its folder."""


@dataclass(frozen=True)
class AdoptedImages:
    """Labeled images in shards that another program wrote; see `AdoptedRecords`.

    Attributes:
        stored: The name of each column in the shards.
        encodings: The encoding of each column.
        classes: The names of the classes, if they are given.
    """

    unit: ClassVar[str] = "image"
    stored: dict[str, str]
    encodings: dict[str, str]
    classes: list[str] | None

    @classmethod
    def find(cls, splits: Mapping[str, MdsSplit], columns: Mapping[str, str], classes: Path | None) -> AdoptedImages:
        """Return the images in the shards of all splits.

        Args:
            splits: The splits.
            columns: The names of the columns with the ``image`` and the ``label``, if they have other names.
            classes: A file with the names of the classes.

        Raises:
            ConfigError: If a column is missing or holds neither an image nor a label.
        """
        stored = {"image": "image", "label": "label", **columns}
        if unknown := stored.keys() - {"image", "label"}:
            raise ConfigError(f"--columns {min(unknown)}=…: expected image=NAME,label=NAME")
        found = find_encodings(splits, stored)
        if found["image"] not in IMAGE_ENCODINGS:
            kinds = ", ".join(IMAGE_ENCODINGS)
            raise ConfigError(f"column {stored['image']!r} is {found['image']}, but an image must be one of {kinds}")
        column, encoding = stored["label"], found["label"]
        if encoding not in (*INTEGER_ENCODINGS, NAME_ENCODING):
            raise ConfigError(f"column {column!r} is {encoding}, but a label must be an integer or text (str)")
        if encoding == NAME_ENCODING and classes is None:
            raise ConfigError(f"column {column!r} holds the names of classes; list all of them in a --classes FILE")
        return cls(stored, found, None if classes is None else read_class_names(classes))

    @property
    def given(self) -> dict[str, Any]:
        """Return the names of columns and classes."""
        return {"columns": self.stored, "class_names": self.classes}

    @property
    def reading_schema(self) -> RecordSchema:
        """Return the schema with the given names of classes, or without names."""
        return self._schema(self.classes or [])

    def measure(self, read: ReadColumn, *, first: bool) -> int:
        """Return the label, and check that the first image of a shard can be read.

        Raises:
            ValueError: If no class has this label, or the image cannot be read.
        """
        label: int = read("label")
        classes = MAX_CLASSES if self.classes is None else len(self.classes)
        if not 0 <= label < classes:
            advice = "name the classes with --classes" if self.classes is None else "add its name to --classes"
            raise ValueError(f"label {label} is not in 0 to {classes - 1}; {advice}, or use another column")
        if first:
            decode_image(read("image"))
        return label

    def describe(self, counts: Mapping[str, Counter[int]]) -> Description:
        """Return the description, given how often each label occurs in each split."""
        largest = max(label for labels in counts.values() for label in labels)
        classes = self.classes or [str(label) for label in range(largest + 1)]
        rows = {split: [labels[label] for label in range(len(classes))] for split, labels in counts.items()}
        lines = [describe_counts("classes", rows, classes)]
        if empty := [name for name, count in zip(classes, rows["train"], strict=True) if not count]:
            others = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
            lines.append(f"classes without training images: {', '.join(empty[:5])}{others}")
        return Description(self._schema(classes), {"counts": rows}, lines)

    def add_files(self, folder: Path) -> None:
        """Write nothing: the description has no further files."""

    def _schema(self, classes: list[str]) -> RecordSchema:
        return RecordSchema(LABELLED_IMAGE, self.encodings, {"classes": classes})
