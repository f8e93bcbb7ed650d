"""Samples of a source, before they are prepared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Sample(NamedTuple):
    """An image with its label.

    Attributes:
        name: Unique name in the source.
        label: Index of the class.
        image: Path of an image file, or pixels [H, W] or [H, W, 3] uint8.
        stamp: Size in bytes and modification time in nanoseconds of the file; None for pixels.
    """

    name: str
    label: int
    image: str | np.ndarray
    stamp: tuple[int, int] | None = None

    @property
    def content(self) -> str:
        """Return the SHA-256 of the file or the pixels; an empty string if the file cannot be read."""
        if not isinstance(self.image, str):
            return hashlib.sha256(repr(self.image.shape).encode() + self.image.tobytes()).hexdigest()
        try:
            return hashlib.sha256(Path(self.image).read_bytes()).hexdigest()
        except OSError:
            return ""


@dataclass(frozen=True)
class Source:
    """A source with the list of its samples. Image files are not read yet.

    Attributes:
        kind: The kind of source, such as ``images`` or ``cifar-10``.
        classes: Names of the classes.
        splits: The samples of ``"train"`` and ``"val"``.
        folder: The absolute path of a folder of images; otherwise None.
        notes: What the description of the data says about how a folder was read (plain JSON values).
    """

    kind: str
    classes: list[str]
    splits: dict[str, list[Sample]]
    folder: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 of names, labels, and sizes and modification times of files, or pixels."""
        return self._hash(sample.stamp or sample.content for samples in self.splits.values() for sample in samples)

    def content_hash(self, contents: Iterable[str]) -> str:
        """Return a SHA-256 of names, labels and contents.

        Args:
            contents: The content hash of each sample, in the order of ``splits``.
        """
        return self._hash(contents)

    def _hash(self, values: Iterable[Any]) -> str:
        digest = hashlib.sha256(repr((self.kind, self.classes)).encode())
        rows = [(split, sample.name, sample.label) for split, samples in self.splits.items() for sample in samples]
        for row in sorted((*row, value) for row, value in zip(rows, values, strict=True)):
            digest.update(repr(row).encode())
        return digest.hexdigest()
